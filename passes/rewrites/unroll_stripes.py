"""Stripes become intervals, for kernels that walk intervals alone.

    [lo, hi) in a stripe of (step, offset, width)
      ->  [start + n * step, start + n * step + width) cut to [lo, hi), for n = 0 .. periods - 1,
          with start the beginning of the period that holds lo; the last one takes in what further periods there are

so the result covers the stripe for every tile and size, and is the stripe where a tile meets at most `periods`. In tile
order the window of a neighbourhood is a few tiles out of each of a few rows of tiles: one interval for each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from attncc.ir import Attention, Bounds, Const, Expr, Interval
from attncc.ir.affine import Extents, simplify
from attncc.ir.bounds import TILE_HI, TILE_LO, Stripe
from attncc.ir.build import ONE, ZERO, add, const, floordiv, le, maximum, minimum, mul, sub, where
from attncc.ir.terms import loads
from attncc.passes.bounds.bounds import MAX_INTERVALS
from attncc.passes.bounds.simulate import simulate

_LEAST_STEP = 64  # a shorter period than a block of keys skips none


def unroll_stripes(a: Attention, bounds: Bounds, sizes: Sequence[int] = (), tile_rows: int = 64) -> Bounds:
    """`bounds` with the longest stripe of each interval unrolled, where that takes at most MAX_INTERVALS intervals for
    these sizes and tiles of `tile_rows` rows. The result holds for any sizes and tiles. Bounds that read data stay."""
    read = [x for r in bounds.rows for x in loads(r.expr)]
    read += loads(*(n for x in bounds.visit for n in (x.lo, x.hi, *(n for s in x.stripes for n in _parts(s)))))
    if read or not any(_long(x) for x in bounds.visit):
        return bounds
    tiles = simulate(a, bounds, sizes, tile_rows=tile_rows)
    counts: list[int] = []
    for x, tile in zip(bounds.visit, tiles.visit, strict=True):
        periods = 1
        if _long(x):
            step, offset, _ = tile.stripes[0]
            some = tile.lo < tile.hi
            met = (tile.hi - 1 - offset).div(step, rounding_mode="floor")
            met -= (tile.lo - offset).div(step, rounding_mode="floor")
            periods = 1 + int((met * some).max())
        counts.append(periods)
    if sum(counts) > MAX_INTERVALS:
        return bounds
    extents: dict[Expr, Expr] = {x.index: x.extent for x in a.axes}
    extents |= {TILE_LO: a.i.extent, TILE_HI: add(a.i.extent, ONE)}
    visit: list[Interval] = []
    for x, n in zip(bounds.visit, counts, strict=True):
        visit += unrolled(x, n, extents) if _long(x) else [x]
    return replace(bounds, visit=tuple(visit), residue=None)


def _parts(s: Stripe) -> tuple[Expr, Expr, Expr]:
    return s.step, s.offset, s.width


def _long(x: Interval) -> bool:
    return x.stripe is not None and isinstance(x.stripe.step, Const) and int(x.stripe.step.value) >= _LEAST_STEP


def unrolled(x: Interval, periods: int, extents: Extents) -> list[Interval]:
    """Intervals that together cover `x`."""
    assert x.stripe is not None
    step, offset, width = _parts(x.stripe)
    lo = maximum(x.lo, ZERO)
    start = add(offset, mul(floordiv(sub(lo, offset), step), step))
    found: list[Interval] = []
    for n in range(periods):
        begin = add(start, mul(step, const(n)))
        end = minimum(x.hi, add(begin, width))
        if n == periods - 1:
            end = where(le(x.hi, add(begin, step)), end, x.hi)
        first, end = simplify(maximum(lo, begin), extents), simplify(end, extents)
        found.append(Interval(first, end, x.finer[0] if x.finer else None, x.finer[1:]))
    return found
