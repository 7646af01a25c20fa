"""Batch axes that operands take apart become two axes.

    x in X, read as x // c or x % c, c divides X   ->   x0 in X / c, x1 in c,  with x = x0 * c + x1

    before   batch h = 8     q[h, i, d]              k[h // 4, j, d]
    after    batch h0 = 2, h1 = 4   q[h0 * 4 + h1, i, d]    k[h0, j, d]

so that operand indices become affine: grouped-query heads, and batch and heads flattened into one axis. Where `out` had
one dimension X it now has two, X / c and c, side by side; they lie in memory as the one did, and flattening them gives
the shape from before. The same holds for `lse` and `weights`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from attncc.ir import Attention, Axis, Const, Expr, Op, Program, Rearrange, Size, Step, Tensor, kind_of
from attncc.ir.affine import divide, simplify
from attncc.ir.attention import fresh_name
from attncc.ir.build import ONE, ZERO, add, mul
from attncc.ir.rewrite import substitute
from attncc.ir.terms import free, walk
from attncc.passes.protocol import Legality
from attncc.passes.rewrites.expressions import map_expressions

Factors = Mapping[Size, Expr]


@dataclass(frozen=True)
class SplitAxes:
    """x in X, read as x // c  ->  x0 in X / c, x1 in c;    what is given is put together again by a rearrangement

    `factors` says which of the program's sizes are products of others."""

    name: ClassVar[str] = "split-axes"
    legality: ClassVar[Legality] = "exact"

    factors: tuple[tuple[Size, Expr], ...] = ()

    def __call__(self, p: Program, /) -> Program:
        steps: list[Step] = []
        for step in p.steps:
            steps += self._split(step) if isinstance(step.node, Attention) else [step]
        return p if len(steps) == len(p.steps) else replace(p, steps=tuple(steps))

    def _split(self, step: Step) -> list[Step]:
        assert isinstance(step.node, Attention)
        own: dict[Expr, Expr] = {x: s for s, x in zip(step.node.sizes, step.sizes, strict=True) if isinstance(x, Size)}
        known = {own[s]: substitute(x, own) for s, x in self.factors if s in own and free(x) <= {*own}}
        after, parts = split_into(step.node, {s: x for s, x in known.items() if isinstance(s, Size)})
        if after == step.node:
            return [step]
        split = tuple(f"{name}_parts" for name in step.results)
        joins = [_join(step.node, after, parts, at) for at in range(len(split))]
        sizes: dict[Expr, Expr] = dict(zip(step.node.sizes, step.sizes, strict=True))
        whole = zip(step.results, joins, split, strict=True)
        return [
            replace(step, results=split, node=after),
            *(Step((name,), join, (part,), tuple(sizes[s] for s in join.sizes)) for name, join, part in whole),
        ]


def _join(before: Attention, after: Attention, parts: Mapping[str, tuple[str, ...]], output: int) -> Rearrange:
    """What puts the axes of an output together again that became several."""
    given = kind_of(after).gives(after)[output]
    every = {"out": (before.out_axes, after.out_axes), "lse": ((*before.batch, before.i), (*after.batch, after.i)),
             "weights": ((*before.batch, before.i, before.j), (*after.batch, after.i, after.j))}  # fmt: skip
    whole, own = every[given.name]
    used = {s for x in own for s in free(x.extent)}
    return Rearrange(
        tuple(s for s in after.sizes if s in used), own, (Tensor("x", given.dtype, given.shape),),
        tuple((x.name,) for x in own), tuple(parts.get(x.name, (x.name,)) for x in whole),
    )  # fmt: skip


def split_axes(a: Attention, factors: Factors | None = None) -> Attention:
    """`a` with every batch axis split that an operand indexes by quotient or remainder.

    An axis of constant extent splits by its divisors. One whose extent is a size splits only if `factors` says what the
    size is a product of (`{BH: B * 8}`), and if the quotient is a constant or one of `a.sizes`. Other axes stay."""
    return split_into(a, factors or {})[0]


def split_into(a: Attention, factors: Factors) -> tuple[Attention, dict[str, tuple[str, ...]]]:
    """`split_axes`, and the names of the axes that each axis became."""
    parts: dict[str, tuple[str, ...]] = {}
    while (found := _divisor(a, factors)) is not None:
        axis = found[0]
        a, new = _split(a, *found)
        whole = next((name for name, own in parts.items() if axis.name in own), axis.name)
        before = parts.get(whole, (axis.name,))
        at = before.index(axis.name)
        parts[whole] = (*before[:at], *new, *before[at + 1 :])
    return a, parts


def _divisor(a: Attention, factors: Factors) -> tuple[Axis, Const | Size, Const | Size] | None:
    """(axis, extent / c, c) of the next split: the largest divisor first, so that the others divide what is left."""
    found: list[tuple[Axis, Const | Size, Const | Size]] = []
    for x in walk(*(n for access in (a.q, a.k, a.v) for n in access.index)):
        if not (isinstance(x, Op) and x.name in ("floordiv", "mod")):
            continue
        index, by = x.args
        for axis in a.batch:
            if axis.index is index and isinstance(by, Const | Size) and by is not ONE:
                quotient = _quotient(axis.extent, by, a, factors)
                if quotient is not None:
                    found.append((axis, quotient, by))
    return max(found, key=_rank, default=None)


def _rank(split: tuple[Axis, Const | Size, Const | Size]) -> tuple[bool, int, str]:
    by = split[2]
    return isinstance(by, Size), int(by.value) if isinstance(by, Const) else 0, repr(split[0].name)


def _quotient(extent: Const | Size, by: Const | Size, a: Attention, factors: Factors) -> Const | Size | None:
    whole: Expr = factors.get(extent, extent) if isinstance(extent, Size) else extent
    quotient, rest = divide(whole, by, {})
    if rest is not ZERO or quotient is ZERO or quotient is ONE:
        return None
    if isinstance(quotient, Const) or (isinstance(quotient, Size) and quotient in a.sizes):
        return quotient
    return None


def _split(
    a: Attention, axis: Axis, quotient: Const | Size, by: Const | Size
) -> tuple[Attention, tuple[str, str]]:  # fmt: skip
    taken = {x.name for x in a.axes} | {s.name for s in a.sizes} | {t.name for t in a.tensors}
    outer, inner = (Axis(fresh_name(f"{axis.name}{n}", taken), e) for n, e in ((0, quotient), (1, by)))
    at = a.batch.index(axis)
    batch = (*a.batch[:at], outer, inner, *a.batch[at + 1 :])
    layout = [n for name in a.layout for n in ((outer.name, inner.name) if name == axis.name else (name,))]
    whole: dict[Expr, Expr] = {axis.index: add(mul(outer.index, by), inner.index)}
    result = replace(a.substitute(whole), batch=batch, layout=tuple(layout))
    extents: dict[Expr, Expr] = {x.index: x.extent for x in result.axes}
    return map_expressions(result, lambda x: simplify(x, extents)), (outer.name, inner.name)

