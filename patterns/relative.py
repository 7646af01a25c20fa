"""Biases that depend on the distance of a key from its query alone: one number a distance, not one a pair.

    bias[.., i, j] = f(.., j - i)      ->      table[.., t] = f(.., t - (N - 1)),   bias = table[.., j - i + N - 1]

A model that looks such a bias up at a costly index (logarithmic buckets) makes a tensor of N * M elements a head. The
table has N + M - 1, is computed in the graph by the model's own formula, and is made once for all layers.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import fx

from attncc.ir.affine import simplify
from attncc.ir.build import add, const, sub
from attncc.ir.evaluate import DTYPE_OF
from attncc.ir.expr import ROUNDINGS, Const, Expr, Index, Load, Op, free, loads, substitute, walk
from attncc.patterns.facts import Facts
from attncc.patterns.moves import Point

aten: Any = torch.ops.aten
_T = Index("t")
#: Formulas of more nodes than this are not worth their operations in the graph.
_MOST_NODES = 120
_NAMED = {
    "add": aten.add.Tensor, "sub": aten.sub.Tensor, "mul": aten.mul.Tensor, "div": aten.div.Tensor,
    "mod": aten.remainder.Tensor, "min": aten.minimum.default, "max": aten.maximum.default, "lt": aten.lt.Tensor,
    "le": aten.le.Tensor, "eq": aten.eq.Tensor, "ne": aten.ne.Tensor, "and": aten.logical_and.default,
    "or": aten.logical_or.default, "not": aten.logical_not.default, "neg": aten.neg.default, "abs": aten.abs.default,
    "where": aten.where.self, "exp": aten.exp.default, "log": aten.log.default, "log1p": aten.log1p.default,
    "tanh": aten.tanh.default, "sigmoid": aten.sigmoid.default, "sqrt": aten.sqrt.default, "rsqrt": aten.rsqrt.default,
    "floor": aten.floor.default, "ceil": aten.ceil.default, "round": aten.round.default, "sin": aten.sin.default,
    "cos": aten.cos.default, "pow": aten.pow.Tensor_Tensor,
}  # fmt: skip
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DIVISIONS = {"floordiv": "floor", "truncdiv": "trunc"}


def by_distance(
    f: Facts, n: fx.Node, value: Expr, at: Point, pair: frozenset[Expr], extents: dict[Expr, Expr]
) -> Load | None:
    """A load from a table by distance of what `n` holds at `at`, its formula being `value`, or None where it depends on
    more than the distance of the two indices of `pair`, or where their extents are symbols."""
    key = next((x for x in reversed(at) if x in pair), None)
    row = next((x for x in pair if x is not key), None)
    if key is None or row is None or len(pair) != 2 or not pair <= free(value):
        return None
    rows, keys = extents[row], extents[key]
    dtype = f.dtype(n)
    if not isinstance(rows, Const) or not isinstance(keys, Const) or dtype not in _DTYPES:
        return None
    first = const(int(rows.value) - 1)
    count = int(rows.value) + int(keys.value) - 1
    bounded: dict[Expr, Expr] = {**extents, _T: const(count)}
    formula = simplify(substitute(value, {key: sub(add(row, _T), first)}), bounded)
    others = [x for x in extents if x in free(formula) and x is not row]
    fits = free(formula) == frozenset[Expr]((_T, *others)) and all(isinstance(extents[x], Const) for x in others)
    written = any(f.by_name.get(x.tensor) not in f.unwritten for x in loads(formula))
    if not fits or written or not loads(formula) or sum(1 for _ in walk(formula)) > _MOST_NODES:
        return None
    known = ("by distance", formula, dtype, count, tuple(extents[x] for x in others))
    table = f.tables.get(known)
    if table is None:
        sizes = [*(int(extents[x].value) for x in others if isinstance(extents[x], Const)), count]  # type: ignore[union-attr]
        table = f.tables[known] = _Made(f, f.order[n] + 1, [*others, _T], sizes).table(formula, dtype)
    distance = simplify(add(sub(key, row), first), extents)
    return Load(table.name, (*others, distance), "float")


class _Made:
    """Nodes that compute expressions over some axes, at a position of the graph."""

    def __init__(self, f: Facts, at: int, axes: list[Expr], sizes: list[int]) -> None:
        self.f, self.at, self.axes, self.sizes = f, at, axes, sizes
        self.known: dict[Expr, fx.Node] = {}

    def table(self, formula: Expr, dtype: torch.dtype) -> fx.Node:
        source = self.f.value(self.f.by_name[loads(formula)[0].tensor])
        self.device: torch.device = source.device
        with getattr(source, "fake_mode", None) or nullcontext():
            for x in walk(formula):
                self.known[x] = self._node(x)
            full = self._make(aten.expand.default, self.known[formula], self.sizes)
            return self._make(aten.to.dtype, full, dtype)

    def _make(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.f.make(target, args, self.at, **kwargs)

    def _node(self, x: Expr) -> fx.Node:
        of = self.known
        if isinstance(x, Const):
            dtype = {"bool": torch.bool, "int": torch.int64, "float": torch.float32}[x.kind]
            return self._make(aten.full.default, [], x.value, dtype=dtype, device=self.device)
        if isinstance(x, Index):
            place = self.axes.index(x)
            shape = [-1 if n == place else 1 for n in range(len(self.axes))]
            line = self._make(aten.arange.default, self.sizes[place], dtype=torch.int64, device=self.device)
            return self._make(aten.view.default, line, shape)
        if isinstance(x, Load):
            value = self._make(aten.index.Tensor, self.f.by_name[x.tensor], [of[c] for c in x.index])
            dtype = {"bool": torch.bool, "int": torch.int64, "float": torch.float32}[x.kind]
            return self._make(aten.to.dtype, value, dtype)
        assert isinstance(x, Op)
        args = [of[a] for a in x.args]
        if x.name in ("float", "int"):
            return self._make(aten.to.dtype, args[0], torch.float32 if x.name == "float" else torch.int64)
        if x.name in ROUNDINGS:
            rounded = self._make(aten.to.dtype, args[0], DTYPE_OF[x.name])
            return self._make(aten.to.dtype, rounded, torch.float32)
        if x.name in _DIVISIONS:
            return self._make(aten.div.Tensor_mode, *args, rounding_mode=_DIVISIONS[x.name])
        return self._make(_NAMED[x.name], *args)
