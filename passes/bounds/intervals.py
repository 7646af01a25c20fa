"""The keys a clause covers over a whole tile of rows.

For a tile of rows T and a clause that allows row i the keys [lo(i), hi(i)) where g(i) holds,

    cover = [ min_{i in T, g(i)} lo(i),  max_{i in T, g(i)} hi(i) )

A guard affine in the row cuts the tile; extremes in closed form are preferred, and the kernel scans the rows of the
tile (`RowBound`) where data per row is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from attncc.ir.affine import Extents, expr, nonnegative, poly, simplify
from attncc.ir.bounds import TILE_HI, TILE_LO, Bits, RowBound, Stripe
from attncc.ir.build import ONE, ZERO, add, and_, le, lt, maximum, minimum, mul, sub, where
from attncc.ir.expr import Const, Expr, Op, mentions, walk
from attncc.passes.bounds.predicates import Clause, reads
from attncc.passes.bounds.rows import RowSet, RowStripe, row_set
from attncc.passes.bounds.tiles import TileRows, contiguous, trend


@dataclass(frozen=True)
class Cover:
    """Keys lo <= j < hi (None: unbounded) in all `stripes` and `bits`, where `when` holds, else none. `exact`: the
    smallest such interval of every tile, without gaps; `rows_exact`: so for tiles of one row."""

    lo: Expr | None
    hi: Expr | None
    when: Expr
    stripes: tuple[Stripe, ...]
    exact: bool
    rows_exact: bool
    bits: tuple[Bits, ...] = ()


class RowScans:
    """The `RowBound`s an analysis asked for, each expression once. With `allowed` False there are none."""

    def __init__(self, *, allowed: bool) -> None:
        self.allowed = allowed
        self.found: list[RowBound] = []

    def extreme(self, op: str, x: Expr) -> Expr:
        for bound in self.found:
            if bound.op == op and bound.expr is x:
                return bound.index
        bound = RowBound(f"r{len(self.found)}", "min" if op == "min" else "max", x)
        self.found.append(bound)
        return bound.index


def cover(clause: Clause, i: Expr, j: Expr, m: Expr, extents: Extents, scans: RowScans) -> Cover:
    """The cover of `clause` by one interval, for `m` keys."""
    rows = row_set(clause, i, j, extents)
    first, last, when = _rows_of(rows, i, extents)
    tile = TileRows(i, first, last, extents)
    scan_guards = scans.allowed and bool(rows.guard)
    exact = rows.exact and (not rows.guard or scan_guards)
    rows_exact = exact
    lows, highs = _strongest(rows.lo, extents, low=True), _strongest(rows.hi, extents, low=False)
    some = and_(*rows.guard, *(lt(x, y) for x in lows for y in highs if not nonnegative(sub(sub(y, x), ONE), extents)))
    lo, lo_exact, lo_scanned = _end(rows, lows, some, tile, m, scans, low=True)
    hi, hi_exact, hi_scanned = _end(rows, highs, some, tile, m, scans, low=False)
    rows_exact = rows_exact and lo_exact and hi_exact
    exact = rows_exact and not rows.guard and not lo_scanned and not hi_scanned
    exact = exact and contiguous(lows, highs, i, extents)
    stripes = [_stripe(s, tile, extents, scans) for s in rows.stripes]
    known = tuple(s for s in stripes if s is not None)
    rows_exact = rows_exact and len(known) == len(stripes)
    if rows.stripes:
        fixed = not any(mentions(x, i) for s in rows.stripes for x in (s.low, s.high))
        exact = exact and fixed and len(rows.stripes) == 1
    if rows.guard and not (lo_scanned or hi_scanned):
        rows_exact = False
    return Cover(lo, hi, when, known, exact, rows_exact)


def _rows_of(rows: RowSet, i: Expr, extents: Extents) -> tuple[Expr, Expr, Expr]:
    """First and last row of the tile that the clause speaks of, and the condition for there being one."""
    first: Expr = TILE_LO
    end: Expr = TILE_HI
    for x in rows.first:
        first = maximum(first, x)
    for x in rows.end:
        end = minimum(end, x)
    when = and_(*rows.when)
    if rows.first or rows.end:
        when = and_(when, lt(first, end))  # the tile itself is never empty
    return first, sub(end, ONE), when


def _end(
    rows: RowSet, ends: tuple[Expr, ...], some: Expr, tile: TileRows, m: Expr, scans: RowScans, *, low: bool
) -> tuple[Expr | None, bool, bool]:
    """`some`: whether a row sees a key at all, by its guards and both its ends; others are not scanned.

    (the end, whether it is attained by every single row, whether rows are scanned for it)."""
    join: Callable[[Expr, Expr], Expr] = maximum if low else minimum
    if scans.allowed and (rows.guard or any(reads(x, tile.i) for x in ends)):
        value: Expr = ZERO if low else m
        for x in ends:
            value = join(value, x)
        condition = and_(some, *(le(x, tile.i) for x in rows.first), *(lt(tile.i, x) for x in rows.end))
        value = where(condition, value, m if low else ZERO)
        return scans.extreme("min" if low else "max", simplify(value, tile.extents)), True, True
    result: Expr | None = None
    attained = True
    for x in ends:
        found = tile.least(x) if low else tile.most(x)
        if found is None or reads(found, tile.i):
            attained = False
            continue
        attained = attained and not _chooses(x, tile.i)
        found = simplify(found, _tile_extents(tile))
        result = found if result is None else join(result, found)
    return result, attained, False


def _chooses(x: Expr, i: Expr) -> bool:
    """Whether a value depends on a condition on the row, so that its extremes are those of all branches."""
    return any(isinstance(n, Op) and n.name in ("where", "int") and mentions(n, i) for n in walk(x))


def _tile_extents(tile: TileRows) -> Extents:
    extent = tile.extents[tile.i]
    return {**{k: v for k, v in tile.extents.items() if k is not tile.i}, TILE_LO: extent, TILE_HI: add(extent, ONE)}


def _strongest(ends: tuple[Expr, ...], extents: Extents, *, low: bool) -> tuple[Expr, ...]:
    """`ends` without those that another is proven to make redundant."""
    kept: list[Expr] = []
    for at, x in enumerate(ends):
        others = [*kept, *ends[at + 1 :]]
        if not any(nonnegative(sub(y, x) if low else sub(x, y), extents) for y in others):
            kept.append(x)
    return tuple(kept)


def _stripe(stripe: RowStripe, tile: TileRows, extents: Extents, scans: RowScans) -> Stripe | None:
    """The stripe that holds those of all rows: from the lowest low to the highest high."""
    if mentions(stripe.step, tile.i):
        return None
    ends = stripe.low, stripe.high
    # i % c - r is i - r up to a multiple of c: shifting with the row is narrower than starting over at each period
    shifted = unwrapped(stripe.low, stripe.step), unwrapped(stripe.high, stripe.step)
    if not mentions(expr(poly(sub(*ends))), tile.i) and trend(shifted[0], tile.i, extents) == 1:
        ends = shifted
    low, high = tile.least(ends[0]), tile.most(ends[1])
    if scans.allowed and any(reads(x, tile.i) for x in ends):
        low, high = scans.extreme("min", ends[0]), scans.extreme("max", ends[1])
    if low is None or high is None:
        return None
    width = add(sub(high, low), ONE)
    return Stripe(stripe.step, *(simplify(x, extents) for x in (low, width)))


def unwrapped(x: Expr, step: Expr) -> Expr:
    """`x` up to a multiple of `step`: moduli by that step give way to what they reduce."""
    total: Expr = ZERO
    for m, c in poly(x).items():
        term: Expr = Const(c)
        for f in m:
            wrapped = len(m) == 1 and isinstance(f, Op) and f.name == "mod" and f.args[1] is step
            term = mul(term, f.args[0] if wrapped and isinstance(f, Op) else f)
        total = add(total, term)
    return expr(poly(total))
