"""Loop bounds as runs of key blocks: which blocks a tile visits with its mask, and which without.

All arithmetic is on IR expressions over scalars, so constants fold and what is left is printed before the loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

from attncc.ir import Expr, Interval
from attncc.ir.affine import Extents, nonnegative, simplify
from attncc.ir.bounds import Bounds
from attncc.ir.build import ZERO, add, const, floordiv, le, maximum, minimum, sub, where


@dataclass(frozen=True)
class Run:
    """Blocks start <= block < stop; stop >= start always holds."""

    start: Expr
    stop: Expr

    @property
    def length(self) -> Expr:
        return sub(self.stop, self.start)


@dataclass(frozen=True)
class Segments:
    """Disjoint runs of blocks. `full` blocks lie in [0, M) and every key in them is visible to every row."""

    masked: tuple[Run, ...]
    full: tuple[Run, ...]


def segments(bounds: Bounds, keys: Expr, block: int, extents: Extents) -> Segments:
    """`bounds` over `keys` keys in blocks of `block`."""
    cut = _Cutter(keys, block, extents)
    visit = cut.disjoint([cut.covering(x) for x in bounds.visit])
    full = cut.disjoint([cut.inside(x) for x in bounds.full])
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
