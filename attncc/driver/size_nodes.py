"""Sizes of attentions as nodes of the graph that is edited."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from attncc.driver.capture import Reading
from attncc.errors import EditError
from attncc.ir.evaluate import ARITHMETIC
from attncc.ir.expr import Const, Expr, Op, Size
from attncc.ir.reasons import because
from attncc.patterns.graph.facts import Facts


class SizeNodes:
    """The nodes of one graph that hold sizes, made as they are asked for. `order` is where each node stands."""

    def __init__(self, reading: Reading, facts: Facts, order: Mapping[fx.Node, int]) -> None:
        self.reading, self.facts, self.order = reading, facts, order
        self.graph = reading.graph
        self._known: dict[Expr, fx.Node] = {}

    def of(self, x: Expr, before: fx.Node) -> int | fx.Node:
        """A node (or number) for an integer expression over the graph's symbols, available before a node."""
        if isinstance(x, Const):
            return int(x.value)
        known = self._known.get(x)
        if known is None:
            known = self._find(x, before)
            if isinstance(x, Size):
                self._known[x] = known
        return known

    def _find(self, x: Expr, before: fx.Node) -> fx.Node:
        for shadow, node in self.reading.origin.items():
            value = self.facts.value(shadow)
            if isinstance(value, torch.SymInt) and node.op == "placeholder" and self.facts.size(value) is x:
                return node
        for shadow, node in self.reading.origin.items():
            if node.op != "placeholder" or not self.facts.is_tensor(shadow):
                continue
            for dim, extent in enumerate(self.facts.shape(shadow)):
                if extent is x:
                    return self._dimension(node, dim)
        if isinstance(x, Op) and x.name in ARITHMETIC:
            args = [self.of(a, before) for a in x.args]
            return self.graph.call_function(ARITHMETIC[x.name], tuple(args))
        for shadow, node in self.reading.origin.items():
            if node in self.order and self.order[node] < self.order.get(before, -1) and self.facts.is_tensor(shadow):
                for dim, extent in enumerate(self.facts.shape(shadow)):
                    if extent is x:
                        return self._dimension(node, dim)
        raise EditError(because("graph-size", repr(x)))

    def _dimension(self, node: fx.Node, dim: int) -> fx.Node:
        last = max((n for n in self.order if n.op == "placeholder"), key=self.order.__getitem__)
        with self.graph.inserting_after(last if node.op == "placeholder" else node):
            return self.graph.call_function(torch.ops.aten.sym_size.int, (node, dim))


def example_of(x: int | fx.Node) -> Any:
    """What a size was when the graph was captured: a number or a symbol."""
    if not isinstance(x, fx.Node):
        return x
    if "example_value" in x.meta:
        return x.meta["example_value"]
    if x.target is torch.ops.aten.sym_size.int:
        tensor, dim = x.args
        assert isinstance(tensor, fx.Node) and isinstance(dim, int)
        return tensor.meta["example_value"].shape[dim]
    assert callable(x.target)
    return x.target(*(example_of(a) for a in x.args if isinstance(a, int | fx.Node)))
