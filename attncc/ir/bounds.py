"""Loop bounds of one tile of rows: which keys it visits, and which of those need no mask.

A tile is the rows `i0 <= i < i1` (never empty) of one batch point. Bounds are expressions over the batch indices, the
sizes, `i0`, `i1`, and loads at those; kernels print them before their key loop.
"""

from __future__ import annotations

from dataclasses import dataclass

from attncc.ir.build import ZERO
from attncc.ir.expr import Expr, Index

TILE_LO, TILE_HI = Index("i0"), Index("i1")


@dataclass(frozen=True)
class Interval:
    """Keys lo <= j < hi. May come out empty (hi <= lo) and is not clipped: kernels clip to [0, M)."""

    lo: Expr
    hi: Expr


@dataclass(frozen=True)
class Bounds:
    """`visit` covers every visible key of the tile; inside `full` every key is visible to every row of the tile.

    Intervals may overlap: kernels visit the union once, in order. `residue` = (step, offset) restricts the visit
    further to keys with (j - offset) % step == 0. `exact` says that `visit` is the smallest union of intervals that
    covers the visible keys, so nothing is left to gain. No `full` interval means every visited key evaluates the mask.
    """

    visit: tuple[Interval, ...]
    full: tuple[Interval, ...] = ()
    residue: tuple[Expr, Expr] | None = None
    exact: bool = False


def everything(m: Expr) -> Bounds:
    """Bounds that skip nothing, over `m` keys, for a mask that is all true."""
    whole = (Interval(ZERO, m),)
    return Bounds(whole, whole, exact=True)


def unskipped(m: Expr) -> Bounds:
    """Bounds that skip nothing and evaluate the mask everywhere."""
    return Bounds((Interval(ZERO, m),))
