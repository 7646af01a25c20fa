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
from dataclasses import replace

from attncc.ir import Attention, Axis, Const, Expr, Op, Size
from attncc.ir.affine import divide, simplify
from attncc.ir.build import ONE, ZERO, add, mul
from attncc.ir.terms import walk
from attncc.passes.rewrites.expressions import map_expressions

Factors = Mapping[Size, Expr]


def split_axes(a: Attention, factors: Factors | None = None) -> Attention:
    """`a` with every batch axis split that an operand indexes by quotient or remainder.

    An axis of constant extent splits by its divisors. One whose extent is a size splits only if `factors` says what the
    size is a product of (`{BH: B * 8}`), and if the quotient is a constant or one of `a.sizes`. Other axes stay."""
    known = factors or {}
    while (found := _divisor(a, known)) is not None:
        a = _split(a, *found)
    return a


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


def _split(a: Attention, axis: Axis, quotient: Const | Size, by: Const | Size) -> Attention:
    taken = {x.name for x in a.axes} | {s.name for s in a.sizes} | {t.name for t in a.tensors}
    outer, inner = (Axis(_fresh(f"{axis.name}{n}", taken), e) for n, e in ((0, quotient), (1, by)))
    at = a.batch.index(axis)
    batch = (*a.batch[:at], outer, inner, *a.batch[at + 1 :])
    layout = [n for name in a.layout for n in ((outer.name, inner.name) if name == axis.name else (name,))]
    whole: dict[Expr, Expr] = {axis.index: add(mul(outer.index, by), inner.index)}
    result = replace(a.substitute(whole), batch=batch, layout=tuple(layout))
    extents: dict[Expr, Expr] = {x.index: x.extent for x in result.axes}
    return map_expressions(result, lambda x: simplify(x, extents))


def _fresh(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    return name
