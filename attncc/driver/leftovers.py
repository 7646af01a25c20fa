"""What an edit makes idle: nodes that nobody reads any more are erased, and what writes stays."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

_NEW = {"new_zeros", "new_full", "new_empty", "zeros", "zeros_like", "full", "empty"}


class Leftovers:
    """Erases nodes of one graph. `effects` do more than give their results; `writes`, of these, write to their first
    argument and nothing else."""

    def __init__(self, graph: fx.Graph, effects: set[fx.Node], writes: set[fx.Node]) -> None:
        self.graph, self.effects, self.writes = graph, effects, writes

    def remove(self, start: fx.Node) -> None:
        """Erase `start` and what only it used, stopping at anything that writes or draws random numbers."""
        stack = [start]
        while stack:
            n = stack.pop()
            if n.users or n.op in ("placeholder", "output") or n in self.effects or n._erased:
                continue
            inputs = n.all_input_nodes
            self.graph.erase_node(n)
            stack += inputs

    def drop_unread(self) -> None:
        """New tensors that are filled in and never read, of which one may be written into another: `remove` stops at
        the write."""
        while sum(self._dropped(n) for n in reversed(list(self.graph.nodes))):
            pass

    def _dropped(self, n: fx.Node) -> bool:
        if n._erased or getattr(n.target, "__name__", n.target) not in _NEW:
            return False
        reached = _reached_by(n)
        if any(x.op == "output" or (x in self.effects and not self._fills(x, reached)) for x in reached):
            return False
        if not any(self._fills(x, reached) for x in reached):
            return False
        inputs = [a for x in reached for a in x.all_input_nodes if a not in reached]
        for x in sorted(reached, reverse=True):  # nodes compare by their place in the graph
            self.graph.erase_node(x)
        for a in inputs:
            self.remove(a)
        return True

    def _fills(self, n: fx.Node, tensors: Collection[fx.Node]) -> bool:
        """Whether a node does nothing but write to one of some tensors."""
        return n in self.writes and bool(n.args) and n.args[0] in tensors

    def drop_empty_vmaps(self) -> None:
        """Levels of vmap that nothing is left in: what made a block mask is gone, and its levels stay."""
        open_levels: list[fx.Node] = []
        loads: list[fx.Node] = []
        for n in list(self.graph.nodes):
            name = getattr(n.target, "__name__", "")
            if name == "_vmap_increment_nesting":
                open_levels.append(n)
            elif name == "_vmap_decrement_nesting" and open_levels:
                self.graph.erase_node(n)
                self.graph.erase_node(open_levels.pop())
            elif name == "_add_batch_dim" and not n.users:
                self.remove(n)
            elif name == "lazy_load_decompositions":
                loads.append(n)
            else:
                open_levels.clear()
        if not any(getattr(n.target, "__name__", "") == "_vmap_increment_nesting" for n in self.graph.nodes):
            for n in loads:
                self.graph.erase_node(n)


def _reached_by(n: fx.Node) -> dict[fx.Node, None]:
    """A node and everything computed from it."""
    found: dict[fx.Node, None] = {}
    stack = [n]
    while stack:
        x = stack.pop()
        if x not in found:
            found[x] = None
            stack += x.users
    return found
