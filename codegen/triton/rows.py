"""The rows of one tile: those of the batch axes that share their keys are folded into it with the rows of i."""

from __future__ import annotations

from collections.abc import Iterator

from attncc.codegen.triton.segments import narrow_stripe
from attncc.ir import Attention, Axis, Expr, Interval
from attncc.ir.analysis import folded_axes
from attncc.ir.bounds import Bounds


def row_axes(a: Attention, bounds: Bounds, *, lists: bool = False) -> tuple[Axis, ...]:
    """The folded axes, slowest first, and i: row r of a tile is i = r // G of the group member r % G, with G the
    product of the extents of the folded ones. `lists`: the tile walks lists of blocks."""
    return (*folded_axes(a, _once_a_tile(bounds, lists=lists)), a.i)


def _once_a_tile(bounds: Bounds, *, lists: bool) -> Iterator[Expr]:
    """What has one value for all rows of a tile: the ends of intervals, and the stripes that are gathered. What is read
    per row is worked out for each row of the tile, whichever axis it belongs to; bits are not looked at."""
    striped = False
    for x in bounds.visit:
        yield from (x.lo, x.hi)
        for s in () if lists else x.stripes:
            if narrow_stripe(Interval(x.lo, x.hi, s), 1) is not None:
                striped = True
                yield from (s.step, s.offset, s.width)
    for x in (*bounds.full, *(bounds.full_parts if striped else ())):
        yield from (x.lo, x.hi)
