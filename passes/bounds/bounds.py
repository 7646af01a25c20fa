"""Masks become loop bounds.

    visit = U over the clauses of the mask of cover(clause)
    full  = N over the clauses of its negation of the complement of cover(clause)

The normal form of the mask is a disjunction, so the keys that any row of a tile sees are a union; the normal form of
its negation gives the keys that some row does not see, and what is left is seen by all of them. Both sides are covers,
so `visit` may only be too large and `full` only too small. Taking covers from each other makes many pieces, of which
`full` keeps a few; `hidden` is the covers as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from attncc.ir import Attention, Bounds, Const, Expr, Index, Interval
from attncc.ir.affine import Extents, expr, nonnegative, poly, simplify
from attncc.ir.bounds import TILE_HI, TILE_LO, RowBound, Stripe, everything, unskipped
from attncc.ir.build import ONE, TRUE, ZERO, add, and_, lt, maximum, minimum, not_, sub, where
from attncc.ir.rewrite import substitute
from attncc.ir.terms import walk
from attncc.passes.bounds.block_maps import BlockMap
from attncc.passes.bounds.intervals import Cover, RowScans, cover
from attncc.passes.bounds.predicates import Clause, NormalForm, TooManyClauses, with_clamps

MAX_INTERVALS = 8
MAX_HIDDEN = 16
#: Covers with both ends that `full` is cut by; beyond, each clause of the mask gives its own full keys, which is no
#: less sound but misses keys that different clauses show to different rows.
MAX_SPLITS = 3
MAX_PIECES = 16
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
    a: Attention, *, rows: bool = False, outer: Expr | None = None, inner: Expr | None = None,
    maps: Mapping[Expr, BlockMap] | None = None,
) -> Analysis:  # fmt: skip
    """`outer` and `inner` stand in for the mask where it reads data by key: the mask implies `outer`, which bounds the
    visit, and `inner` implies the mask, and gives full keys. `maps` are those of literals of both."""
    m = a.j.extent
    if a.mask is TRUE and outer in (None, TRUE):
        return Analysis(everything(m), True)
    extents: dict[Expr, Expr] = {x.index: x.extent for x in a.axes}
    form = NormalForm(a.i.index, a.j.index, extents)
    scans = RowScans(allowed=rows)

    def canonical(mask: Expr) -> Expr:
        return with_clamps(simplify(mask, extents), extents)

    some = {canonical(x): m.some for x, m in (maps or {}).items()}
    outside = {not_(canonical(x)): m.every for x, m in (maps or {}).items()}

    def clauses_of(mask: Expr, *, positive: bool = True) -> list[Clause] | None:
        if a.i.extent is ONE:
            mask = substitute(mask, {a.i.index: ZERO})
        try:
            return form.clauses(canonical(mask), positive=positive)
        except TooManyClauses:
            return None

    def covers(mask: Expr, *, positive: bool) -> list[Cover] | None:
        clauses = clauses_of(mask, positive=positive)
        bits = some if positive else outside
        return None if clauses is None else [
            replace(cover(c, a.i.index, a.j.index, m, extents, scans), bits=tuple(bits[x] for x in c if x in bits))
            for c in clauses
        ]

    at_tile = {**extents, TILE_LO: a.i.extent, TILE_HI: add(a.i.extent, ONE)}
    seen = covers(a.mask if outer is None else outer, positive=True)
    if seen is None:
        return Analysis(unskipped(m), False)
    visit, merged = _union(seen, m, at_tile, MAX_INTERVALS)
    full: list[Interval] = []
    mask = a.mask if inner is None else inner
    hidden = covers(mask, positive=False)
    gaps = None if hidden is None else _union([_without_bits(c) for c in hidden], m, at_tile, MAX_HIDDEN)[0]
    if hidden is not None and sum(c.lo is not None and c.hi is not None for c in hidden) <= MAX_SPLITS:
        full = _full(hidden, m, at_tile)
    else:
        for clause in clauses_of(mask) or ():
            rest = covers(and_(*clause), positive=False)
            full += [] if rest is None else _full(rest, m, at_tile)
    whole = tuple(x for x in dict.fromkeys(full) if _whole(x))[:MAX_INTERVALS]
    parts = tuple(x for x in dict.fromkeys(full) if not _whole(x) and not _held(x, whole, at_tile))
    exact = not merged and outer is None and all(c.exact for c in seen)
    parts = parts[:MAX_INTERVALS]
    read = _used(scans, visit, whole, parts, gaps or ())
    bounds = Bounds(visit, whole, _residue(visit), exact, read, parts, gaps)
    return Analysis(bounds, not merged and all(c.rows_exact for c in seen))


def _without_bits(c: Cover) -> Cover:
    """The cover of a hidden clause, whose bits say where it never holds."""
    return replace(c, bits=tuple(replace(n, outside=True) for n in c.bits))


def _union(covers: list[Cover], m: Expr, extents: Extents, most: int) -> tuple[tuple[Interval, ...], bool]:
    """The covers as intervals, those inside others left out, and whether there were more than `most`, so that the last
    became one."""
    intervals: list[Interval] = []
    for c in covers:
        lo = ZERO if c.lo is None else c.lo
        hi = m if c.hi is None else c.hi
        if c.when is not TRUE:
            hi = where(c.when, hi, lo)
        stripe = c.stripes[0] if c.stripes else None
        ends = simplify(lo, extents), simplify(hi, extents)
        intervals.append(Interval(*ends, stripe, c.stripes[1:], tuple(sorted(c.bits, key=repr))))
    kept: list[Interval] = []
    for at, x in enumerate(intervals):
        if not any(_inside(x, y, extents) for y in [*kept, *intervals[at + 1 :]]):
            kept.append(x)
    merged = len(kept) > most
    if merged:
        rest = kept[most - 1 :]
        lo, hi = rest[0].lo, rest[0].hi
        for x in rest[1:]:
            lo, hi = minimum(lo, x.lo), maximum(hi, x.hi)
        kept = [*kept[: most - 1], Interval(lo, hi)]
    return tuple(kept), merged


def _inside(x: Interval, y: Interval, extents: Extents) -> bool:
    if (y.stripe is not None and y.stripes != x.stripes) or not set(y.bits) <= set(x.bits):
        return False
    return _at_least(x.lo, y.lo, extents) and _at_least(y.hi, x.hi, extents)


def _held(x: Interval, others: tuple[Interval, ...], extents: Extents) -> bool:
    return any(_inside(x, y, extents) for y in others)


def _full(hidden: list[Cover], m: Expr, extents: Extents) -> list[Interval]:
    """[0, m) without every cover, as intervals, of which some hold in a stripe alone: a cover leaves what lies outside
    its ends, and what lies between its stripes or in its bits (those of a hidden literal say where it never holds)."""
    left: list[Interval] = [Interval(ZERO, m)]
    for c in hidden:
        lo, hi = c.lo, c.hi
        when = c.when
        if lo is not None and hi is not None and not _at_least(hi, add(lo, ONE), extents):
            when = and_(when, lt(lo, hi))
        if lo is None and hi is None:
            lo, hi = (None, None) if c.when is TRUE else (where(c.when, ZERO, m), m)
        lo = None if lo is None else simplify(where(when, lo, m), extents)
        hi = None if hi is None else simplify(where(when, hi, ZERO if lo is None else m), extents)
        pieces: list[Interval] = []
        for x in left:
            if lo is not None:
                pieces.append(replace(x, hi=lo if x.hi is m else _smaller(x.hi, lo, extents)))
            if hi is not None:
                pieces.append(replace(x, lo=hi if x.lo is ZERO else _larger(x.lo, hi, extents)))
            if _whole(x):
                pieces += [replace(x, stripe=s) for s in map(_between, c.stripes) if s is not None]
                pieces += [replace(x, bits=(n,)) for n in c.bits]
            elif x.stripe in map(_between, c.stripes) if x.stripe is not None else x.bits[0] in c.bits:
                pieces.append(x)
        left = [x for x in dict.fromkeys(pieces) if not _at_least(x.lo, x.hi, extents)][:MAX_PIECES]
    return left


def _whole(x: Interval) -> bool:
    return x.stripe is None and not x.bits


def _between(s: Stripe) -> Stripe | None:
    """The keys outside a stripe, None where there are none."""
    rest = sub(s.step, s.width)
    if isinstance(rest, Const) and int(rest.value) <= 0:
        return None
    return Stripe(s.step, expr(poly(add(s.offset, s.width))), rest)


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
        named |= set(walk(*x.expressions))
    return tuple(b for b in scans.found if b.index in named)

