"""Masks become loop bounds.

    visit = U over the clauses of the mask of cover(clause)
    full  = N over the clauses of its negation of the complement of cover(clause)

The normal form of the mask is a disjunction, so the keys that any row of a tile sees are a union; the normal form of
its negation gives the keys that some row does not see, and what is left is seen by all of them. Both sides are covers,
so `visit` may only be too large and `full` only too small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attncc.ir import Attention, Bounds, Expr, Index, Interval
from attncc.ir.affine import Extents, nonnegative, simplify
from attncc.ir.bounds import TILE_HI, TILE_LO, RowBound, Stripe, everything, unskipped
from attncc.ir.build import ONE, TRUE, ZERO, add, and_, lt, maximum, minimum, sub, where
from attncc.ir.rewrite import substitute
from attncc.ir.terms import walk
from attncc.passes.intervals import Cover, RowScans, cover
from attncc.passes.predicates import Clause, NormalForm, TooManyClauses, with_clamps

MAX_INTERVALS = 8
#: Covers with both ends that `full` is cut by; beyond, each clause of the mask gives its own full keys, which is no
#: less sound but misses keys that different clauses show to different rows.
MAX_SPLITS = 3
_TAIL = Index("i1 - i0 - 1")


@dataclass(frozen=True)
class Analysis:
    """Bounds, and whether the visit of every tile of a single row is exactly the keys of that row that the mask, or
    what stands in for it, lets through."""

    bounds: Bounds
    rows_exact: bool


def loop_bounds(a: Attention, *, rows: bool = False) -> Bounds:
    """The bounds of one tile of rows of `a`.

    With `rows` the bounds may hold `RowBound`s, which let data per row (positions, document starts) bound the loop."""
    return analyse(a, rows=rows).bounds


def analyse(
    a: Attention, *, rows: bool = False, outer: Expr | None = None, inner: Sequence[Expr] = ()
) -> Analysis:
    """`outer` and `inner` stand in for the mask where it reads data by key: the mask implies `outer`, which bounds the
    visit, and each of `inner` implies the mask, and gives full keys."""
    m = a.j.extent
    if a.mask is TRUE:
        return Analysis(everything(m), True)
    extents: dict[Expr, Expr] = {x.index: x.extent for x in a.axes}
    form = NormalForm(a.i.index, a.j.index, extents)
    scans = RowScans(allowed=rows)

    def clauses_of(mask: Expr, *, positive: bool = True) -> list[Clause] | None:
        if a.i.extent is ONE:
            mask = substitute(mask, {a.i.index: ZERO})
        try:
            return form.clauses(with_clamps(simplify(mask, extents), extents), positive=positive)
        except TooManyClauses:
            return None

    def covers(mask: Expr, *, positive: bool) -> list[Cover] | None:
        clauses = clauses_of(mask, positive=positive)
        return None if clauses is None else [cover(c, a.i.index, a.j.index, m, extents, scans) for c in clauses]

    at_tile = {**extents, TILE_LO: a.i.extent, TILE_HI: add(a.i.extent, ONE)}
    seen = covers(a.mask if outer is None else outer, positive=True)
    if seen is None:
        return Analysis(unskipped(m), False)
    visit, merged = _visit(seen, m, at_tile)
    full: tuple[Interval, ...] = ()
    for mask in inner or (a.mask,):
        hidden = covers(mask, positive=False)
        if hidden is not None and sum(c.lo is not None and c.hi is not None for c in hidden) <= MAX_SPLITS:
            full += _full(hidden, m, at_tile)
            continue
        for clause in clauses_of(mask) or ():
            outside = covers(and_(*clause), positive=False)
            full += () if outside is None else _full(outside, m, at_tile)
    full = tuple(dict.fromkeys(full))[:MAX_INTERVALS]
    exact = not merged and outer is None and all(c.exact for c in seen)
    bounds = Bounds(visit, full, _residue(visit), exact, _used(scans, visit, full))
    return Analysis(bounds, not merged and all(c.rows_exact for c in seen))


def _visit(covers: list[Cover], m: Expr, extents: Extents) -> tuple[tuple[Interval, ...], bool]:
    intervals: list[Interval] = []
    for c in covers:
        lo = ZERO if c.lo is None else c.lo
        hi = m if c.hi is None else c.hi
        if c.when is not TRUE:
            hi = where(c.when, hi, lo)
        stripe = c.stripes[0] if c.stripes else None
        intervals.append(Interval(simplify(lo, extents), simplify(hi, extents), stripe, c.stripes[1:]))
    kept: list[Interval] = []
    for at, x in enumerate(intervals):
        if not any(_inside(x, y, extents) for y in [*kept, *intervals[at + 1 :]]):
            kept.append(x)
    merged = len(kept) > MAX_INTERVALS
    if merged:
        rest = kept[MAX_INTERVALS - 1 :]
        lo, hi = rest[0].lo, rest[0].hi
        for x in rest[1:]:
            lo, hi = minimum(lo, x.lo), maximum(hi, x.hi)
        kept = [*kept[: MAX_INTERVALS - 1], Interval(lo, hi)]
    return tuple(kept), merged


def _inside(x: Interval, y: Interval, extents: Extents) -> bool:
    if y.stripe is not None and y.stripes != x.stripes:
        return False
    return _at_least(x.lo, y.lo, extents) and _at_least(y.hi, x.hi, extents)


def _full(hidden: list[Cover], m: Expr, extents: Extents) -> tuple[Interval, ...]:
    """[0, m) without every cover, as at most MAX_INTERVALS intervals."""
    left: list[tuple[Expr, Expr]] = [(ZERO, m)]
    for c in hidden:
        lo, hi = c.lo, c.hi
        when = c.when
        if lo is not None and hi is not None and not _at_least(hi, add(lo, ONE), extents):
            when = and_(when, lt(lo, hi))
        if lo is None and hi is None:
            if c.when is TRUE:
                return ()
            lo, hi = where(c.when, ZERO, m), m
        lo = None if lo is None else simplify(where(when, lo, m), extents)
        hi = None if hi is None else simplify(where(when, hi, ZERO if lo is None else m), extents)
        pieces: list[tuple[Expr, Expr]] = []
        for x, y in left:
            if lo is not None:
                pieces.append((x, lo if y is m else _smaller(y, lo, extents)))
            if hi is not None:
                pieces.append((hi if x is ZERO else _larger(x, hi, extents), y))
        left = [(x, y) for x, y in pieces if not _at_least(x, y, extents)]
        left = list(dict.fromkeys(left))
    return tuple(Interval(x, y) for x, y in left[:MAX_INTERVALS])


def _at_least(x: Expr, y: Expr, extents: Extents) -> bool:
    """Whether x >= y is proven for every tile, i0 < i1 among what is known."""
    difference = sub(x, y)
    apart = substitute(difference, {TILE_HI: add(add(TILE_LO, ONE), _TAIL)})
    return nonnegative(difference, extents) or nonnegative(apart, {**extents, _TAIL: extents[TILE_LO]})


def _smaller(x: Expr, y: Expr, extents: Extents) -> Expr:
    return x if _at_least(y, x, extents) else y if _at_least(x, y, extents) else minimum(x, y)


def _larger(x: Expr, y: Expr, extents: Extents) -> Expr:
    return x if _at_least(x, y, extents) else y if _at_least(y, x, extents) else maximum(x, y)


def _residue(visit: tuple[Interval, ...]) -> tuple[Expr, Expr] | None:
    """The stripe that all intervals share, where it is one key wide."""
    stripes: set[Stripe | None] = {x.stripe for x in visit}
    if len(stripes) != 1:
        return None
    (stripe,) = stripes
    return (stripe.step, stripe.offset) if stripe is not None and stripe.width is ONE else None


def _used(scans: RowScans, *groups: tuple[Interval, ...]) -> tuple[RowBound, ...]:
    named: set[Expr] = set()
    for x in (x for group in groups for x in group):
        named |= set(walk(x.lo, x.hi))
        named |= {n for s in x.stripes for n in walk(s.step, s.offset, s.width)}
    return tuple(b for b in scans.found if b.index in named)

