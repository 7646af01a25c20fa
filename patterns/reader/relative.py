"""Biases that depend on the distance of a key from its query alone: one number a distance, not one a pair.

    bias[.., i, j] = f(.., j - i)      ->      table[.., t] = f(.., t - (N - 1)),   bias = table[.., j - i + N - 1]

A model that looks such a bias up at a costly index (logarithmic buckets) makes a tensor of N * M elements a head. The
table has N + M - 1, is computed in the graph by the model's own formula, and is made once for all layers. N and M may
be symbols: they are then read from the shapes of the graph's inputs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx

from attncc.ir.affine import simplify
from attncc.ir.build import ONE, add, sub
from attncc.ir.evaluate import DTYPE_OF
from attncc.ir.expr import ROUNDINGS, Const, Expr, Index, Load, Op, Size, free, loads, substitute, walk
from attncc.patterns.reader.rules import Facts, Point

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
    "stop": aten.detach.default, "erf": aten.erf.default, "isnan": aten.isnan.default,
}  # fmt: skip
_ARITHMETIC: dict[str, Callable[..., Any]] = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CHOICES = {"minfirst": aten.lt.Tensor, "maxfirst": aten.gt.Tensor}
_DIVISIONS = {"floordiv": "floor", "truncdiv": "trunc"}


def by_distance(
    f: Facts, n: fx.Node, value: Expr, at: Point, pair: frozenset[Expr], extents: dict[Expr, Expr]
) -> Load | None:
    """A load from a table by distance of what `n` holds at `at`, its formula being `value`, or None where it depends on
    more than the distance of the two indices of `pair`, or where a size is none of the inputs'."""
    key = next((x for x in reversed(at) if x in pair), None)
    row = next((x for x in pair if x is not key), None)
    if not f.tables or key is None or row is None or len(pair) != 2 or not pair <= free(value):
        return None
    rows, keys = extents[row], extents[key]
    dtype = f.dtype(n)
    if dtype not in _DTYPES:
        return None
    first = sub(rows, ONE)
    count = add(first, keys)
    bounded: dict[Expr, Expr] = {**extents, _T: count}
    formula = simplify(substitute(value, {key: sub(add(row, _T), first)}), bounded)
    others = [x for x in extents if x in free(formula) and x is not row]
    sizes = [*(extents[x] for x in others), count]
    indices = {x for x in free(formula) if not isinstance(x, Size)}
    fits = indices == {_T, *others} and _known(f, formula, sizes)
    written = any(f.by_name.get(x.tensor) not in f.unwritten for x in loads(formula))
    if not fits or written or not loads(formula) or sum(1 for _ in walk(formula)) > _MOST_NODES:
        return None
    known = ("by distance", formula, dtype, count, tuple(extents[x] for x in others))
    table = f.make_once(known, lambda: _Made(f, f.order[n] + 1, [*others, _T], sizes).table(formula, dtype))
    distance = simplify(add(sub(key, row), first), extents)
    return Load(table.name, (*others, distance), "float")


def _told(f: Facts, size: Size) -> tuple[fx.Node, int | None] | None:
    """An input that is a size, or one that has it, and in which dimension."""
    for n in f.nodes:
        if n.op == "placeholder" and f.is_tensor(n) and size in (shape := f.shape(n)):
            return n, shape.index(size)
        if n.op == "placeholder" and isinstance(f.value(n), torch.SymInt) and f.size(n) is size:
            return n, None
    return None


def _known(f: Facts, formula: Expr, sizes: Sequence[Expr]) -> bool:
    """Whether the graph's inputs tell every size, and the sums and products of them that are asked for."""
    numbers = set(walk(*sizes))
    told = all(_told(f, x) is not None for x in {*numbers, *free(formula)} if isinstance(x, Size))
    return told and all(x.name in _ARITHMETIC for x in numbers if isinstance(x, Op))


class _Made:
    """Nodes that compute expressions over some axes, at a position of the graph."""

    def __init__(self, f: Facts, at: int, axes: list[Expr], sizes: list[Expr]) -> None:
        self.f, self.at, self.axes = f, at, axes
        self.known: dict[Expr, fx.Node] = {}
        self.numbers: dict[Expr, fx.Node] = {}
        self.sizes = [self._number(x) for x in sizes]

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

    def _number(self, x: Expr) -> int | fx.Node:
        """A size as a number of the graph."""
        if isinstance(x, Const):
            return int(x.value)
        if x not in self.numbers:
            if isinstance(x, Size):
                found = _told(self.f, x)
                assert found is not None  # by `_known`
                n, dim = found
                self.numbers[x] = n if dim is None else self._make(aten.sym_size.int, n, dim)
            else:
                assert isinstance(x, Op)
                self.numbers[x] = self._make(_ARITHMETIC[x.name], *(self._number(a) for a in x.args))
        return self.numbers[x]

    def _node(self, x: Expr) -> fx.Node:
        of = self.known
        if isinstance(x, Size):
            return self._make(aten.full.default, [], self._number(x), dtype=torch.int64, device=self.device)
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
        if x.name in _CHOICES:
            second = self._make(_CHOICES[x.name], args[1], args[0])
            second = self._make(aten.logical_or.default, second, self._make(aten.isnan.default, args[1]))
            return self._make(aten.where.self, second, args[1], args[0])
        return self._make(_NAMED[x.name], *args)
