"""Tokens of a grid in tile order, so that what is near in space is near in memory.

    token (y, x) of Y x X, row-major    t  = y * X + x
    in tiles of A x B, tile order       t' = ((y // A) * (X // B) + x // B) * A * B + (y % A) * B + x % B

and so for any number of dimensions. Attention does not depend on the order of the tokens, so q, k and v are stored in
tile order, each row and key index of score, mask and weight becomes the row-major position of the token it now means,
and `out` comes in tile order. A kernel's tile of rows is then one tile of the grid: of a neighbourhood of k x k tokens
it visits the few tiles around it, where a run of rows of the image visits whole rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from attncc.ir import Attention, Const, Expr, Op
from attncc.ir.affine import simplify
from attncc.ir.build import ZERO, add, const, floordiv, mod, mul
from attncc.ir.rewrite import substitute
from attncc.ir.terms import walk
from attncc.passes.predicates import mentions


@dataclass(frozen=True)
class TileOrder:
    """A grid of tokens, extents outermost first, and the tiles it is cut into. Raises ValueError unless they divide."""

    grid: tuple[int, ...]
    tile: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.grid) != len(self.tile) or any(g % t for g, t in zip(self.grid, self.tile, strict=True)):
            raise ValueError(f"tiles of {self.tile} do not divide a grid of {self.grid}")

    @property
    def tokens(self) -> int:
        return _product(self.grid)

    def position(self, t: Expr) -> Expr:
        """The row-major position of the token that is at `t` in tile order."""
        inside = _product(self.tile)
        tile, offset = floordiv(t, const(inside)), mod(t, const(inside))
        total: Expr = ZERO
        for at, (g, w) in enumerate(zip(self.grid, self.tile, strict=True)):
            tiles_after = _product([g // w for g, w in zip(self.grid[at + 1 :], self.tile[at + 1 :], strict=True)])
            number = mod(floordiv(tile, const(tiles_after)), const(g // w))
            within = mod(floordiv(offset, const(_product(self.tile[at + 1 :]))), const(w))
            total = add(total, mul(add(mul(number, const(w)), within), const(_product(self.grid[at + 1 :]))))
        return total

    def to_tiles(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """`x` with the tokens of dimension `dim` in tile order."""
        cut = [n for g, w in zip(self.grid, self.tile, strict=True) for n in (g // w, w)]
        return self._moved(x, dim, cut, [*range(0, len(cut), 2), *range(1, len(cut), 2)])

    def from_tiles(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """The inverse of `to_tiles`."""
        cut = [*(g // w for g, w in zip(self.grid, self.tile, strict=True)), *self.tile]
        half = len(self.grid)
        return self._moved(x, dim, cut, [n for at in range(half) for n in (at, half + at)])

    def _moved(self, x: torch.Tensor, dim: int, cut: Sequence[int], order: Sequence[int]) -> torch.Tensor:
        dim %= x.ndim
        parts = x.reshape(*x.shape[:dim], *cut, *x.shape[dim + 1 :])
        moved = [*range(dim), *(dim + n for n in order), *range(dim + len(cut), parts.ndim)]
        return parts.permute(moved).reshape(x.shape)


def tile_layout(a: Attention, order: TileOrder) -> Attention:
    """`a` for tokens in `order`: the caller passes q, k and v through `to_tiles`, and `out`, `lse` and `weights` back
    through `from_tiles`. Other tensors stay as they are.

    Raises ValueError unless rows and keys are the tokens of the grid and q, k and v index one dimension by them."""
    if any(x.extent != Const(order.tokens) for x in (a.i, a.j)):
        raise ValueError(f"rows and keys are {a.i.extent!r} and {a.j.extent!r}, not the {order.tokens} of the grid")
    for access, token in ((a.q, a.i.index), (a.k, a.j.index), (a.v, a.j.index)):
        for n in access.index:
            if n is not token and mentions(n, token):
                raise ValueError(f"{access.tensor} is indexed by {n!r}, not by the token alone")
    extents: dict[Expr, Expr] = {x.index: x.extent for x in a.axes}
    moved: dict[Expr, Expr] = {x.index: order.position(x.index) for x in (a.i, a.j)}

    def on(x: Expr) -> Expr:
        return simplify(substitute(x, moved), extents)

    sink = None if a.sink is None else on(a.sink)
    return replace(a, score=on(a.score), mask=on(a.mask), sink=sink, weight=on(a.weight))


def grid_of(a: Attention) -> tuple[int, ...] | None:
    """The grid whose coordinates the mask takes a token apart into, outermost first: i // 64, i // 8 % 8 and i % 8 are
    those of N / 64 x 8 x 8. None where the mask speaks of one dimension, or of none."""
    if not isinstance(a.i.extent, Const) or a.i.extent != a.j.extent:
        return None
    strides: set[int] = set()
    for x in walk(a.mask):
        if isinstance(x, Op) and x.name in ("mod", "floordiv") and isinstance(x.args[1], Const):
            inner, c = x.args[0], int(x.args[1].value)
            scale = 1
            if x.name == "mod" and isinstance(inner, Op) and inner.name == "floordiv":
                inner, by = inner.args
                scale = int(by.value) if isinstance(by, Const) else 0
            if inner in (a.i.index, a.j.index):
                strides.add(c * scale)
    wraps = any(isinstance(x, Op) and x.name == "mod" and mentions(x, a.j.index) for x in walk(a.mask))
    cuts = [int(a.i.extent.value), *sorted(strides - {0, 1}, reverse=True), 1]
    if not wraps or len(cuts) < 3 or any(x % y or x == y for x, y in pairwise(cuts)):
        return None
    return tuple(x // y for x, y in pairwise(cuts))


def tile_of(grid: Sequence[int], tokens: int) -> tuple[int, ...] | None:
    """The tile of `tokens` tokens that divides `grid` and is nearest to a cube, or None."""
    best: tuple[int, ...] | None = None
    for tile in _factorings(tokens, len(grid)):
        fits = all(g % t == 0 for g, t in zip(grid, tile, strict=True))
        if fits and (best is None or max(tile) < max(best) or (max(tile) == max(best) and tile < best)):
            best = tile
    return best


def _factorings(n: int, parts: int) -> list[tuple[int, ...]]:
    if parts == 1:
        return [(n,)]
    return [(f, *rest) for f in range(1, n + 1) if n % f == 0 for rest in _factorings(n // f, parts - 1)]


def _product(xs: Sequence[int]) -> int:
    result = 1
    for x in xs:
        result *= x
    return result
