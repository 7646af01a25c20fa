"""How the rows of an attention lie in a tensor of the model that holds a number for each row."""

from __future__ import annotations

from functools import reduce
from itertools import permutations

from torch import fx

from attncc.ir.affine import poly, simplify
from attncc.ir.build import ONE, ZERO, add, mul
from attncc.ir.expr import Expr, free
from attncc.patterns.site.parts import Parts, Rows
from attncc.patterns.site.reading import Point

#: The most dimensions that one axis is looked for in.
_MOST_DIGITS = 4


def rows_of(p: Parts, n: fx.Node, dim: int, at: Point) -> Rows | None:
    """How the attention's rows lie where they are those of the softmax `n` along `dim`, read `at`; none if these are
    others.

    An axis of the attention may be several of the softmax's, in any order: windows and batches, rows of an image."""
    shape = p.facts.shape(n)
    rows = [(x, s) for d, (x, s) in enumerate(zip(at, shape, strict=True)) if d != dim]
    batch = [x for x in p.out if x is not ZERO and x is not p.i and x is not p.e]
    axes = [*batch, *([] if p.i is None else [p.i])]
    if poly(_flat(rows)) == poly(_flat([(x, p.extents[x]) for x in axes])):
        return Rows()
    kept = [(x, s) for x, s in rows if s is not ONE]
    digits = [m for axis in axes for m in _digits(kept, axis, p.extents[axis])]
    if sorted(digits) != list(range(len(kept))):
        return None
    return Rows(tuple(kept[m][1] for m in digits), tuple(digits.index(m) for m in range(len(kept))))


def _digits(rows: list[tuple[Expr, Expr]], axis: Expr, extent: Expr) -> tuple[int, ...]:
    """The rows' dimensions that together count through an axis, the slowest first; none if there are no such."""
    own = [n for n, (x, _) in enumerate(rows) if axis in free(x)]
    for order in permutations(own) if len(own) <= _MOST_DIGITS else ():
        found = [rows[n] for n in order]
        if simplify(_flat(found), {axis: extent}) is axis and poly(reduce(mul, (s for _, s in found))) == poly(extent):
            return order
    return ()


def _flat(axes: list[tuple[Expr, Expr]]) -> Expr:
    """The row-major index of a point."""
    index: Expr = ZERO
    for x, extent in axes:
        index = add(mul(index, extent), x)
    return index
