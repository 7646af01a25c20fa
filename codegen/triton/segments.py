"""Loop bounds as runs of key blocks: which blocks a tile visits with its mask, and which without; and as stripes, whose
keys are gathered from all periods into whole blocks.

All arithmetic is on IR expressions over scalars, so constants fold and what is left is printed before the loop.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce

from attncc.ir import Const, Expr, Interval
from attncc.ir.affine import Extents, nonnegative, poly, simplify
from attncc.ir.affine import expr as from_poly
from attncc.ir.bounds import TILE_HI, TILE_LO, Bounds, Stripe
from attncc.ir.build import ZERO, add, const, floordiv, le, maximum, minimum, mul, sub, where
from attncc.ir.expr import substitute

#: Intervals that become stripes: each is a loop of its own, which costs time to compile and instructions to hold.
MOST_STRIPED = 3


@dataclass(frozen=True)
class Run:
    """Blocks start <= block < stop; stop >= start always holds."""

    start: Expr
    stop: Expr

    @property
    def length(self) -> Expr:
        return sub(self.stop, self.start)


@dataclass(frozen=True)
class Striped:
    """Keys lo <= j < hi with (j - base) % step < width, in none of the runs `but` and of the stripes `before`.

    The first period that reaches past `lo` begins at `base`; `slots` is the number of keys in all periods, the cut ones
    as whole. All rows see every key of `full` stripes."""

    lo: Expr
    hi: Expr
    base: Expr
    step: Expr
    width: Expr
    but: tuple[Run, ...] = ()
    before: tuple[Striped, ...] = ()
    full: bool = False

    @property
    def slots(self) -> Expr:
        periods = floordiv(add(sub(self.hi, self.base), sub(self.step, const(1))), self.step)
        return mul(maximum(periods, ZERO), self.width)


@dataclass(frozen=True)
class Segments:
    """Disjoint runs of blocks, and keys outside them. `full` blocks lie in [0, M) and every key in them is visible to
    every row."""

    masked: tuple[Run, ...]
    full: tuple[Run, ...]
    striped: tuple[Striped, ...] = ()


def segments(bounds: Bounds, keys: Expr, block: int, extents: Extents, rows: int = 0) -> Segments:
    """`bounds` over `keys` keys in blocks of `block`. With `rows`, the most values of the row index in a tile, an
    interval whose stripe leaves out a quarter of its keys or more becomes stripes."""
    cut = _Cutter(keys, block, extents)
    sparse = [(x, narrow_stripe(x, rows)) for x in bounds.visit]
    if sum(stripe is not None for _, stripe in sparse) > MOST_STRIPED:
        sparse = [(x, None) for x in bounds.visit]
    visit = cut.disjoint([cut.covering(x) for x, stripe in sparse if stripe is None])
    full = cut.disjoint([cut.inside(x) for x in bounds.full])
    runs = _runs(visit, full, cut)
    found: list[Striped] = []
    for x, stripe in sparse:
        if stripe is not None:
            before = tuple(found)
            for piece in cut.outside(x, visit):
                but = () if len(visit) == 1 else (*visit, *full)
                found += [replace(s, but=but, before=before) for s in cut.striped(piece, stripe, bounds)]
    return replace(runs, striped=tuple(found))


def narrow_stripe(x: Interval, rows: int) -> Stripe | None:
    """The stripe of an interval that leaves the fewest keys, where it leaves at most three quarters of them."""
    best: tuple[float, Stripe] | None = None
    for stripe in x.stripes if rows else ():
        width = from_poly(poly(substitute(stripe.width, {TILE_HI: add(TILE_LO, const(rows))})))
        if isinstance(stripe.step, Const) and isinstance(width, Const):
            density = int(width.value) / int(stripe.step.value)
            if density <= 0.75 and (best is None or density < best[0]):
                best = density, stripe
    return None if best is None else best[1]


def _runs(visit: list[Run], full: list[Run], cut: _Cutter) -> Segments:
    if not full:
        return Segments(tuple(x for x in visit if x.length is not ZERO), ())
    masked: list[Run] = []
    for run in visit:
        at = run.start
        for f in full:
            masked.append(cut.clipped(at, f.start, run))
            at = f.stop if len(visit) == 1 else maximum(at, f.stop)
        masked.append(cut.clipped(at, run.stop, run))
    if len(visit) == 1:
        full = [cut.clipped(f.start, f.stop, visit[0]) for f in full]
    return Segments(tuple(x for x in masked if x.length is not ZERO), tuple(x for x in full if x.length is not ZERO))


class _Cutter:
    def __init__(self, keys: Expr, block: int, extents: Extents) -> None:
        self.keys, self.block, self.extents = keys, const(block), extents

    def _least(self, a: Expr, b: Expr) -> Expr:
        if nonnegative(sub(b, a), self.extents):
            return a
        return b if nonnegative(sub(a, b), self.extents) else minimum(a, b)

    def _most(self, a: Expr, b: Expr) -> Expr:
        if nonnegative(sub(b, a), self.extents):
            return b
        return a if nonnegative(sub(a, b), self.extents) else maximum(a, b)

    def _clip(self, x: Expr) -> Expr:
        return self._most(self._least(simplify(x, self.extents), self.keys), ZERO)

    def _up(self, x: Expr) -> Expr:
        return floordiv(add(x, sub(self.block, const(1))), self.block)

    def covering(self, x: Interval) -> Run:
        start = floordiv(self._clip(x.lo), self.block)
        stop = self._up(self._clip(x.hi))
        return Run(start, stop if start is ZERO else self._most(start, stop))

    def inside(self, x: Interval) -> Run:
        """Whole blocks alone. A run that ends with the keys may cut its last block short, which is not a whole one."""
        start = self._up(self._clip(x.lo))
        stop = floordiv(self._clip(x.hi), self.block)
        return Run(start, stop if start is ZERO else self._most(start, stop))

    def outside(self, x: Interval, visit: list[Run]) -> list[Interval]:
        """`x` without the keys of the blocks of one run, clipped; all of it where there are more runs."""
        lo, hi = self._clip(x.lo), self._clip(x.hi)
        if len(visit) != 1:
            return [Interval(lo, hi)]
        first, last = mul(visit[0].start, self.block), mul(visit[0].stop, self.block)
        pieces = (Interval(lo, self._least(hi, first)), Interval(self._most(lo, last), hi))
        return [x for x in pieces if not nonnegative(sub(x.lo, x.hi), self.extents)]

    def striped(self, x: Interval, stripe: Stripe, bounds: Bounds) -> list[Striped]:
        """The stripes of a clipped interval: first the keys that `bounds` say are full, then the others."""
        for f in bounds.full_parts:
            if f.stripe is not None and not f.bits and f.lo is ZERO and self._same(f.stripe, stripe):
                middle = self._least(x.hi, self._most(x.lo, self._clip(f.hi)))
                first = replace(self._periods(x.lo, middle, stripe), full=True)
                return [first] if middle is x.hi else [first, self._periods(middle, x.hi, stripe)]
        return [self._periods(x.lo, x.hi, stripe)]

    def _same(self, a: Stripe, b: Stripe) -> bool:
        apart = poly(sub(a.offset, b.offset))
        step = int(a.step.value) if isinstance(a.step, Const) else 0
        return a.step is b.step and a.width is b.width and step > 0 and all(c % step == 0 for c in apart.values())

    def _periods(self, lo: Expr, hi: Expr, stripe: Stripe) -> Striped:
        skipped = sub(add(sub(lo, stripe.offset), stripe.step), stripe.width)
        base = add(stripe.offset, mul(floordiv(skipped, stripe.step), stripe.step))
        return Striped(lo, hi, simplify(base, self.extents), stripe.step, stripe.width)

    def clipped(self, start: Expr, stop: Expr, to: Run) -> Run:
        """[start, stop) met with `to`."""
        first = to.start if start is to.start or start is ZERO else self._most(start, to.start)
        last = to.stop if stop is to.stop else self._least(stop, to.stop)
        if first is last:
            return Run(first, last)
        ordered = first is to.start and last is to.stop
        return Run(first, last if ordered else self._most(first, last))

    def disjoint(self, runs: list[Run]) -> list[Run]:
        """The same blocks in ascending runs that do not overlap: sorted by an exchange network, then cut."""
        runs = list(dict.fromkeys(x for x in runs if x.length is not ZERO))
        if len(runs) < 2:
            return runs
        pairs = [(x.start, x.stop) for x in runs]
        for end in range(len(pairs) - 1, 0, -1):
            for n in range(end):
                pairs[n], pairs[n + 1] = _exchange(pairs[n], pairs[n + 1])
        result, taken = list[Run](), None
        for start, stop in pairs:
            first = start if taken is None else maximum(start, taken)
            result.append(Run(first, stop if taken is None else maximum(first, stop)))
            taken = stop if taken is None else maximum(taken, stop)
        return result


def _exchange(a: tuple[Expr, Expr], b: tuple[Expr, Expr]) -> tuple[tuple[Expr, Expr], tuple[Expr, Expr]]:
    """Two runs ordered by where they start."""
    first = le(a[0], b[0])
    return (
        (minimum(a[0], b[0]), where(first, a[1], b[1])),
        (maximum(a[0], b[0]), where(first, b[1], a[1])),
    )


def total(runs: tuple[Run, ...]) -> Expr:
    return reduce(add, (x.length for x in runs), ZERO)
