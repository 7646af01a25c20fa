"""Which batch axes share their keys, so that their rows fold into one tile and each key is read once for all."""

from __future__ import annotations

from attncc.ir import Attention, Axis
from attncc.ir.bounds import Bounds
from attncc.ir.expr import Expr, free


def folded_axes(a: Attention, bounds: Bounds) -> tuple[Axis, ...]:
    """Batch axes on which neither keys nor values nor the loop bounds depend: the heads of a group.

    Row r of a tile column is then i = r // G of the group member r % G, with G the product of their extents."""
    fixed: set[Expr] = set()
    for x in (*a.k.index, *a.v.index, *(b for each in _bound_expressions(bounds) for b in each)):
        fixed |= free(x)
    return tuple(axis for axis in a.batch if axis.index not in fixed)


def _bound_expressions(bounds: Bounds) -> list[tuple[Expr, Expr]]:
    return [(x.lo, x.hi) for x in (*bounds.visit, *bounds.full)]
