"""Sliding tiles over a grid of tokens (a picture, a video): a tile of rows sees a box of tiles around it.

Zhang et al., 2025 (sliding tile attention, arXiv 2502.04507); Hassani et al., 2025 (generalised neighbourhood
attention, arXiv 2504.16922).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

from attncc.ir import Attention, Const, Expr, Program
from attncc.ir.build import and_, floordiv, le, maximum, minimum, mod, sub
from attncc.ir.reasons import Reason, because
from attncc.passes.policies.hiding import Form, Hiding, hide
from attncc.passes.policies.places import no_distance
from attncc.passes.protocol import Legality


@dataclass(frozen=True)
class SlidingTiles:
    """keep(i, j) = for each side of the grid: |J - min(max(I, w), n - 1 - w)| <= w      w = window // 2, n tiles a side

    I, J: the tiles of row and key on that side. `grid`: tokens per side, slowest first; `tile`: tokens per side of a
    tile, dividing the grid; `window`: tiles per side, odd. At the border the box is moved inside, so that all rows see
    equally much."""

    name: ClassVar[str] = "sliding-tiles"
    legality: ClassVar[Legality] = "approximate"
    grid: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    window: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.grid or not len(self.grid) == len(self.tile) == len(self.window):
            raise ValueError("grid, tile and window name as many sides each")
        if any(t < 1 or g % t for g, t in zip(self.grid, self.tile, strict=True)):
            raise ValueError(f"tiles of {_by(self.tile)} do not divide a grid of {_by(self.grid)}")
        if any(w < 1 or w % 2 == 0 for w in self.window):
            raise ValueError(f"a window is an odd number of tiles a side, not {_by(self.window)}")

    def __call__(self, p: Program, /) -> Program:
        return hide(p, Form(self))

    def applies(self, a: Attention) -> Reason | None:
        tokens = Const(prod(self.grid))
        if a.i.extent != tokens or a.j.extent != tokens:
            return because("policy-other-grid", _by(self.grid))
        return no_distance(a)

    def keep(self, site: Hiding) -> Expr:
        at = site.positions
        kept: list[Expr] = []
        step = prod(self.grid)
        for side, tile, window in zip(self.grid, self.tile, self.window, strict=True):
            step //= side
            if window * tile >= side:
                continue
            row, key = (floordiv(mod(floordiv(x, Const(step)), Const(side)), Const(tile)) for x in (at.row, at.key))
            reach, last = window // 2, side // tile - 1
            centre = minimum(maximum(row, Const(reach)), Const(last - reach))
            kept += [le(sub(key, centre), Const(reach)), le(sub(centre, key), Const(reach))]
        return and_(*kept)


def _by(sides: tuple[int, ...]) -> str:
    return "x".join(map(str, sides))
