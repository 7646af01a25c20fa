"""Edits that can be taken back: an edited copy takes a graph's place, and the graph itself is never touched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import fx


def copied(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy of a graph of Dynamo's, and the copy of each node."""
    made = emptied(graph)
    nodes: dict[fx.Node, fx.Node] = {}
    for n in graph.nodes:
        nodes[n] = copy_node(made, n, nodes.__getitem__)
    return made, nodes


def emptied(graph: fx.Graph) -> fx.Graph:
    """A graph like another, without its nodes."""
    made = fx.Graph(tracer_cls=graph._tracer_cls)
    made._codegen = graph._codegen
    return made


def copy_node(made: fx.Graph, n: fx.Node, arguments: Callable[[fx.Node], fx.Node]) -> fx.Node:
    """A copy of a node of Dynamo's at the end of another graph, its arguments being those that `arguments` gives.

    Placeholders keep what Dynamo hung on them: where their values come from, and their metadata, the same object, as
    Dynamo takes out of it what must not outlive the compilation."""
    return kept(made.node_copy(n, arguments), n)


def kept(new: fx.Node, n: fx.Node) -> fx.Node:
    """A node with all that was hung on another one whose place it takes."""
    new.meta = n.meta if n.op == "placeholder" else dict(n.meta)
    for name, value in vars(n).items():
        if name not in vars(new):
            setattr(new, name, value)
    return new


@dataclass
class GraphEdits:
    """Which graphs were replaced, in the order in which that was done."""

    _replaced: list[tuple[fx.GraphModule, fx.Graph]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self._replaced)

    def replace(self, module: fx.GraphModule, graph: fx.Graph) -> None:
        """Let `graph` take the place of a module's graph; if that fails, the module stays as it was."""
        before = module.graph
        try:
            module.graph = graph
        except BaseException:
            module.graph = before
            raise
        self._replaced.append((module, before))

    def undo(self) -> None:
        """Give every module its own graph back."""
        while self._replaced:
            module, before = self._replaced.pop()
            module.graph = before

    def at_most(self, module: fx.GraphModule, graph: fx.Graph) -> bool:
        """Whether nothing was replaced but `graph`, once, in `module`; or nothing at all."""
        if not self._replaced:
            return module.graph is graph
        ((changed, before), *others) = self._replaced
        return changed is module and before is graph and not others
