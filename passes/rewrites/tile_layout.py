"""Tokens of a grid in tile order, so that what is near in space is near in memory.

    token (y, x) of Y x X, row-major    t  = y * X + x
    in tiles of A x B, tile order       t' = ((y // A) * (X // B) + x // B) * A * B + (y % A) * B + x % B

and so for any number of dimensions. Attention does not depend on the order of the tokens, so q, k and v are stored in
tile order, each row and key index of score, mask and weight becomes the row-major position of the token it now means,
and `out` comes in tile order. A kernel's tile of rows is then one tile of the grid: of a neighbourhood of k x k tokens
it visits the few tiles around it, where a run of rows of the image visits whole rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from typing import Protocol

import torch

from attncc.ir import Attention, Const, Expr, Op
from attncc.ir.affine import poly, simplify
from attncc.ir.build import ZERO, add, const, floordiv, mod, mul
from attncc.ir.rewrite import substitute
from attncc.ir.terms import mentions, walk


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
        return prod(self.grid)

    def position(self, t: Expr) -> Expr:
        """The row-major position of the token that is at `t` in tile order."""
        inside = prod(self.tile)
        tile, offset = floordiv(t, const(inside)), mod(t, const(inside))
        total: Expr = ZERO
        for at, (g, w) in enumerate(zip(self.grid, self.tile, strict=True)):
            tiles_after = prod([g // w for g, w in zip(self.grid[at + 1 :], self.tile[at + 1 :], strict=True)])
            number = mod(floordiv(tile, const(tiles_after)), const(g // w))
            within = mod(floordiv(offset, const(prod(self.tile[at + 1 :]))), const(w))
            total = add(total, mul(add(mul(number, const(w)), within), const(prod(self.grid[at + 1 :]))))
        return total

    def to_tiles(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """`x` with the tokens of dimension `dim` in tile order, dense."""
        return self.seen_in_tiles(x, dim).reshape(x.shape)

    def from_tiles(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """The inverse of `to_tiles`."""
        out = torch.empty_like(x)
        seen = self.seen_in_tiles(out, dim)
        seen.copy_(x.reshape(seen.shape))
        return out

    def seen_in_tiles(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """A view of `x` whose dimensions in place of `dim` are those of the tiles, then those inside a tile."""
        dim %= x.ndim
        cut = [n for g, w in zip(self.grid, self.tile, strict=True) for n in (g // w, w)]
        parts = x.view(*x.shape[:dim], *cut, *x.shape[dim + 1 :])
        order = [dim + n for n in (*range(0, len(cut), 2), *range(1, len(cut), 2))]
        return parts.permute(*range(dim), *order, *range(dim + len(cut), parts.ndim))


class TokenOrder(Protocol):
    """Tokens in another order than the model's."""

    @property
    def tokens(self) -> int: ...

    def position(self, t: Expr) -> Expr:
        """The model's number of the token that is at `t` in this order."""
        ...


def tile_layout(a: Attention, order: TokenOrder) -> Attention:
    """`a` for tokens in `order`: the caller passes q, k and v in that order, and brings `out`, `lse` and `weights` back
    from it (`TileOrder.to_tiles` and `from_tiles`, or layouts). Other tensors stay as they are.

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

    sink, drop = (None if x is None else on(x) for x in (a.sink, a.drop))
    return replace(a, score=on(a.score), mask=on(a.mask), sink=sink, weight=on(a.weight), drop=drop)


def grid_of(a: Attention) -> tuple[int, ...] | None:
    """The grid whose coordinates the mask takes a token apart into, outermost first: i // 64, i // 8 % 8 and i % 8 are
    those of N / 64 x 8 x 8, and i % 3 == j % 3, a dilation, makes N / 3 x 3. None where the mask speaks of one
    dimension, or of none, or of sizes that are no numbers."""
    if not isinstance(a.i.extent, Const) or a.i.extent != a.j.extent:
        return None
    tokens = (a.i.index, a.j.index)
    cuts = {1, int(a.i.extent.value)}
    for x in walk(a.mask):
        if isinstance(x, Op) and x.name == "mod" and isinstance(x.args[1], Const):
            places = [_place(x.args[0], tokens)] if mentions(x.args[0], a.j.index) else []
            if all(mentions(x.args[0], t) for t in tokens):  # (i - j) % 3
                places = [_place(f, tokens) for m in poly(x.args[0]) for f in m if mentions(f, *tokens)]
            for scale in places:
                cuts |= set[int]() if scale is None else {scale, scale * int(x.args[1].value)}
    ordered = sorted(cuts, reverse=True)
    if len(ordered) < 3 or any(x % y for x, y in pairwise(ordered)):
        return None
    return tuple(x // y for x, y in pairwise(ordered))


def _place(x: Expr, tokens: tuple[Expr, ...]) -> int | None:
    """How many tokens one step of `x`, a token's index divided and reduced by numbers, stands for."""
    if x in tokens:
        return 1
    match x:
        case Op("mod", (inner, Const())):
            return _place(inner, tokens)
        case Op("floordiv", (inner, Const(c))):
            scale = _place(inner, tokens)
            return None if scale is None else scale * int(c)
        case _:
            return None
