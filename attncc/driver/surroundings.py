"""The part of a graph that a site stands in: what leads from its operands to its output, and who uses that."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from attncc.driver.names import graph_name
from attncc.report.site import GraphNode

#: Nodes that a drawing holds at most, and steps that it goes back from the output.
MOST_NODES, MOST_STEPS = 28, 12


def around(output: fx.Node, operands: Collection[fx.Node]) -> tuple[GraphNode, ...]:
    """The nodes from `operands` to `output` and the users of the output, in the order of the graph; where the operands
    are further away than a drawing can show, what is nearest."""
    found: dict[fx.Node, str] = {output: "site"}
    edge = [output]
    for _ in range(MOST_STEPS):
        before = [a for n in edge for a in n.all_input_nodes if a not in found]
        edge = []
        for n in before:
            if len(found) < MOST_NODES and n not in found:
                given = n in operands or n.op in ("placeholder", "get_attr")
                found[n] = "given" if given else "own"
                edge += [] if given else [n]
    for n in output.users:
        if len(found) < MOST_NODES + 3 and n.op != "output":
            found.setdefault(n, "user")
    order = sorted(found)  # nodes compare by their place in the graph
    place = {n: at for at, n in enumerate(order)}
    inputs = [tuple(dict.fromkeys(place[a] for a in n.all_input_nodes if a in place)) for n in order]
    return tuple(
        GraphNode(graph_name(n), _operation(n), given, found[n]) for n, given in zip(order, inputs, strict=True)
    )


def _operation(n: fx.Node) -> str:
    """What a node does: `matmul`, `attncc.attention`; empty for an input of the graph."""
    if n.op in ("placeholder", "get_attr"):
        return ""
    if n.op == "call_function":
        namespace = getattr(n.target, "namespace", "")
        name = getattr(n.target, "__name__", str(n.target)).removesuffix(".default")
        return f"{namespace}.{name}" if namespace == "attncc" else name
    return str(n.target)
