"""Edits that can be taken back: an edited copy takes a graph's place, and the graph itself is never touched."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx


def copied(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy of a graph of Dynamo's, and the copy of each node.

    Placeholders keep what Dynamo hung on them: where their values come from, and their metadata, the same object, as
    Dynamo takes out of it what must not outlive the compilation."""
    made = fx.Graph(tracer_cls=graph._tracer_cls)
    made._codegen = graph._codegen
    nodes: dict[fx.Node, fx.Node] = {}
    for n in graph.nodes:
        new = nodes[n] = made.node_copy(n, nodes.__getitem__)
        if n.op == "placeholder":
            new.meta = n.meta
        for name, value in vars(n).items():
            if name not in vars(new):
                setattr(new, name, value)
    return made, nodes


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
