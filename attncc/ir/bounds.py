"""Loop bounds of one tile of rows: which keys it visits, and which of those need no mask.

A tile is the rows `i0 <= i < i1` (never empty) of one batch point. Bounds are expressions over the batch indices, the
sizes, `i0`, `i1`, and loads at those; kernels print them before their key loop.

What a kernel must know: `visit` and `full`, or `visit` and `hidden`. What it may use to skip more, or leave alone:
`Interval.stripe`, `residue`, `full_parts`. A kernel that walks blocks of keys goes from block to block by the stripe:
where a stripe is wider than a block (S2, a neighbourhood in row-major order), the next block begins at the next key of
the stripe; a narrower one (a dilation) is left to the mask, or to a token order that makes it dense
(`attncc.passes.rewrites.tile_layout`).
What only appears where the caller asked for it: `Bounds.rows` (a caller whose kernel cannot scan rows does not ask).
Bounds speak of visible keys alone: a row without any, whose result is the mean of V, is the kernel's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from attncc.ir.build import ZERO
from attncc.ir.expr import Expr, Index

TILE_LO, TILE_HI = Index("i0"), Index("i1")


@dataclass(frozen=True)
class Stripe:
    """Keys with (j - offset) % step < width; `step` >= 1, and a width of `step` or more is every key."""

    step: Expr
    offset: Expr
    width: Expr


@dataclass(frozen=True)
class Bits:
    """Keys whose bit is set in a table of i64: bit `j // block % 64` of tensor[*index, j // block // 64]; or, with
    `outside`, those whose bit is not.

    `index` speaks of batch indices and `i0`: a tile must lie inside the `rows` rows that an entry was made for."""

    tensor: str
    index: tuple[Expr, ...]
    block: int
    rows: int
    outside: bool = False


@dataclass(frozen=True)
class Interval:
    """Keys lo <= j < hi. May come out empty (hi <= lo) and is not clipped: kernels clip to [0, M).

    Outside `stripe` no key of the interval is visible; a kernel may skip blocks that do not meet it, or ignore it.
    Intervals of `Bounds.full` have none. `finer` are more stripes, of shorter periods, of which the same is true, as it
    is of keys outside any of `bits`."""

    lo: Expr
    hi: Expr
    stripe: Stripe | None = None
    finer: tuple[Stripe, ...] = ()
    bits: tuple[Bits, ...] = ()

    @property
    def stripes(self) -> tuple[Stripe, ...]:
        return () if self.stripe is None else (self.stripe, *self.finer)

    @property
    def expressions(self) -> tuple[Expr, ...]:
        stripes = (n for s in self.stripes for n in (s.step, s.offset, s.width))
        return (self.lo, self.hi, *stripes, *(n for x in self.bits for n in x.index))


@dataclass(frozen=True)
class RowBound:
    """The smallest or largest value of `expr`, an integer over the batch indices, the sizes, the row index of the
    attention and loads at those, over the rows i0 <= i < i1. The intervals name it as `Index(name)`.

    A kernel computes it before its key loop: one reduction over the rows of the tile."""

    name: str
    op: Literal["min", "max"]
    expr: Expr

    @property
    def index(self) -> Index:
        return Index(self.name)


@dataclass(frozen=True)
class Bounds:
    """`visit` covers every visible key of the tile; inside `full` every key is visible to every row of the tile.

    Intervals may overlap: kernels visit the union once, in order. `residue` = (step, offset) restricts the visit
    further to keys with (j - offset) % step == 0. `exact` says that `visit` is the smallest union of intervals that
    covers the visible keys, so nothing is left to gain. No `full` interval means every visited key evaluates the mask.
    `full_parts` are more full keys: of each interval those in its one stripe, or of its one set of bits, alone.
    `hidden` covers every key that some row of the tile does not see, so that all others are full: more than `full` and
    `full_parts` have, for kernels that can go from gap to gap; None where it is not known.
    `rows` are the values read from data per row that the intervals mention by name.
    """

    visit: tuple[Interval, ...]
    full: tuple[Interval, ...] = ()
    residue: tuple[Expr, Expr] | None = None
    exact: bool = False
    rows: tuple[RowBound, ...] = ()
    full_parts: tuple[Interval, ...] = ()
    hidden: tuple[Interval, ...] | None = None

    @property
    def intervals(self) -> tuple[Interval, ...]:
        return (*self.visit, *self.full, *self.full_parts, *(self.hidden or ()))

    @property
    def expressions(self) -> tuple[Expr, ...]:
        """Everything that a kernel works out once a tile: ends, stripes and bits of the intervals, and what is read
        per row for them."""
        ends = (n for x in self.intervals for n in x.expressions)
        return (*ends, *(self.residue or ()), *(r.expr for r in self.rows))


def everything(m: Expr) -> Bounds:
    """Bounds that skip nothing, over `m` keys, for a mask that is all true."""
    whole = (Interval(ZERO, m),)
    return Bounds(whole, whole, exact=True, hidden=())


def unskipped(m: Expr) -> Bounds:
    """Bounds that skip nothing and evaluate the mask everywhere."""
    return Bounds((Interval(ZERO, m),))
