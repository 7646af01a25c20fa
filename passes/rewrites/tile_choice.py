"""Which tiles a grid of tokens is cut into, what they see, and whether tile order is worth its copies.

A mask over a grid is mostly a conjunction of terms over one dimension each, m_y(y, y') and m_x(x, x'). Rows of a box of
the grid then see, as a whole, a product of what they see along each dimension:

    some row of the box sees (y', x')   =  any_y m_y(y, y')  and  any_x m_x(x, x')
    all rows of the box see it          =  all_y m_y(y, y')  and  all_x m_x(x, x')

so a table of bits for every tile of rows comes out of a few small squares. Terms over several dimensions are looked at
pair by pair, up to a limit; terms that read data bound nothing. The table is a constant of the attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import ceil, prod

import torch

from attncc.ir import Attention, Bounds, Const, Expr, Index, Interval, Op, Tensor
from attncc.ir.affine import simplify
from attncc.ir.analysis import members
from attncc.ir.bounds import TILE_LO, Bits
from attncc.ir.build import ONE, TRUE, ZERO, add, const, floordiv, mul
from attncc.ir.evaluate import Evaluator
from attncc.ir.expr import Size, loads, mentions, walk
from attncc.ir.rewrite import substitute
from attncc.ir.terms import free
from attncc.passes.bounds.block_maps import BLOCK, words_of
from attncc.passes.bounds.simulate import TileInterval, simulate
from attncc.passes.rewrites.tile_layout import TileOrder, grid_of, tile_layout

#: Moving a row of q, k, v and out costs about as much as this many pairs of a row and a key.
COPIED_ROW = 64
#: Tile order must promise at least this much less work.
LEAST_GAIN = 1.15
#: Gaps of fewer keys are not worth skipping.
LEAST_GAP = 32
#: Pairs looked at one by one for a term over several dimensions.
MOST_PAIRS = 1 << 27
_CANDIDATES = 4


@dataclass(frozen=True)
class InTiles:
    """`attention` in `order`, with `table` declared last, and its bounds; how many keys a row's tile visits on average,
    before and now."""

    attention: Attention
    bounds: Bounds
    order: TileOrder
    table: torch.Tensor
    before: float
    after: float


def in_tiles(a: Attention, bounds: Bounds, tile_rows: int = 64) -> InTiles | str | None:
    """`a`, whose bounds are `bounds`, in the tile order that visits the fewest keys in tiles of `tile_rows` rows; why
    not, where that is no gain; None where the mask speaks of one dimension alone, or of none."""
    grid = grid_of(a)
    if grid is None:
        return _symbolic(a)
    if "weights" in a.outputs:
        return "the weights are asked for, in the order of the tokens"
    if any(x.index in free(a.mask) for x in a.batch):
        return "the mask differs between batch points or heads"
    terms = Terms(a, grid)
    tiles = tiles_of(terms, tile_rows)[:_CANDIDATES]
    if not tiles:
        return f"no tile divides a grid of {' x '.join(map(str, grid))}"
    found = [(o, terms.table(o, tile_rows)) for o in (TileOrder(grid, t) for t in tiles)]
    order, table = min(found, key=lambda x: _keys_visited(x[1]))
    before, after = visited(a, bounds, tile_rows), _keys_visited(table)
    if before < LEAST_GAIN * (after + COPIED_ROW):
        return f"{after:.0f} keys a row and the copies are no gain over {before:.0f}"
    try:
        moved = tile_layout(a, order)
    except ValueError as error:
        return str(error)
    name = "tiles"
    while name in {t.name for t in a.tensors}:
        name += "_"
    moved = replace(moved, tensors=(*a.tensors, Tensor(name, "i64", tuple(const(n) for n in table.shape))))
    at = floordiv(TILE_LO, const(tile_rows))
    some, hidden = (
        Interval(ZERO, a.j.extent, bits=(Bits(name, (at, n), BLOCK, tile_rows, outside=n is ONE),)) for n in (ZERO, ONE)
    )
    return InTiles(moved, Bounds((some,), hidden=(hidden,)), order, table, before, after)


def _symbolic(a: Attention) -> str | None:
    for x in walk(a.mask):
        if isinstance(x, Op) and x.name == "mod" and isinstance(x.args[1], Size) and mentions(x, a.j.index):
            return f"the grid's size {x.args[1]!r} is known at the call alone"
    return None


def tiles_of(terms: Terms, tokens: int) -> list[tuple[int, ...]]:
    """Tiles that divide the grid, those of which runs of `tokens` rows should visit fewest keys first.

    A dimension that a run covers only part of may have the whole of it: the tile is a strip then, and keys are visited
    from the first to the last that the run sees. Of the others whole tiles are visited."""

    def expected(tile: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
        left, rows, block = tokens, list(tile), list(tile)
        for n in reversed(range(len(tile))):  # inside a tile
            rows[n] = min(tile[n], left)
            left //= rows[n]
            block[n] = tile[n] if rows[n] == tile[n] else 1
            left = max(1, left)
        for n in reversed(range(len(tile))):  # from tile to tile
            more = min(terms.grid[n] // tile[n], left)
            rows[n] *= more
            left = max(1, left // more)
        return prod(terms.keys_along(*x) for x in zip(range(len(tile)), rows, block, strict=True)), tile

    every = product(*([n for n in range(1, g + 1) if g % n == 0] for g in terms.grid))
    return sorted((t for t in every if t != terms.grid and prod(t) > 1), key=expected)


def _keys_visited(table: torch.Tensor) -> float:
    bits = (table[:, 0, :, None] >> torch.arange(64)) & 1
    return float(bits.sum()) * BLOCK / len(table)


class Terms:
    """The members of a mask's top conjunction, over coordinates y0, y1, .. of the row and z0, z1, .. of the key."""

    def __init__(self, a: Attention, grid: Sequence[int]) -> None:
        self.grid = tuple(grid)
        self.rows, self.keys = ([Index(f"{name}{n}") for n in range(len(grid))] for name in ("row.", "key."))
        self.extents: dict[Expr, Expr] = dict(zip((*self.rows, *self.keys), map(const, (*grid, *grid)), strict=True))
        tokens: dict[Expr, Expr] = {a.i.index: self._token(self.rows), a.j.index: self._token(self.keys)}
        terms = members("and", a.mask)
        known = [x for x in terms if not loads(x) and not free(x) & {*a.sizes}]
        self.read_data = len(known) < len(terms)
        self.along: dict[int, torch.Tensor] = {}
        self.mixed: list[Expr] = []
        self._counted: dict[tuple[int, int, int], float] = {}
        for x in known:
            term = simplify(substitute(x, tokens), self.extents)
            used = free(term)
            dims = [n for n, (r, k) in enumerate(zip(self.rows, self.keys, strict=True)) if used & {r, k}]
            if len(dims) <= 1:
                n = dims[0] if dims else 0
                seen = self._square(term, n)
                self.along[n] = self.along[n] & seen if n in self.along else seen
            elif term is not TRUE:
                self.mixed.append(term)
        if self.mixed and prod(grid) ** 2 > MOST_PAIRS:
            self.mixed, self.read_data = [], True

    def _token(self, coordinates: Sequence[Expr]) -> Expr:
        total: Expr = ZERO
        for n, x in enumerate(coordinates):
            total = add(total, mul(x, const(prod(self.grid[n + 1 :]))))
        return total

    def _square(self, term: Expr, n: int) -> torch.Tensor:
        """A term over dimension n, (extent, extent)."""
        at = torch.arange(self.grid[n])
        value = Evaluator({self.rows[n]: at[:, None], self.keys[n]: at}, {}, torch.float32)(term)
        return value.expand(self.grid[n], self.grid[n])

    def keys_along(self, n: int, rows: int, block: int) -> float:
        """How many coordinates of dimension n, in whole blocks, runs of `rows` coordinates see on average."""
        if n not in self.along:
            return float(self.grid[n])
        if (n, rows, block) not in self._counted:
            seen = _in_runs(self.along[n], rows).any(1)
            seen = seen.reshape(len(seen), -1, block).any(-1)
            self._counted[n, rows, block] = float(seen.sum()) * block / len(seen)
        return self._counted[n, rows, block]

    def table(self, order: TileOrder, tile_rows: int) -> torch.Tensor:
        """i64[tiles of rows, 2, words]: blocks of keys, in tile order, that some row of the tile sees, or all rows."""
        made: list[torch.Tensor] = []
        tokens = prod(self.grid)
        token_at = order.to_tiles(torch.arange(tokens), 0)
        places = torch.stack([token_at // prod(self.grid[n + 1 :]) % g for n, g in enumerate(self.grid)])
        for rows in self._slices(tokens, tile_rows):
            some = torch.ones(ceil(len(rows) / tile_rows), tokens, dtype=torch.bool)
            every = some & (not self.read_data)
            for n, square in self.along.items():
                seen = _in_runs(square[places[n, rows]], tile_rows)
                some = some & seen.any(1)[:, places[n]]
                every = every & seen.all(1)[:, places[n]]
            for term in self.mixed:
                leaves: dict[Expr, torch.Tensor] = dict(zip(self.rows, places[:, rows, None], strict=True))
                leaves |= dict(zip(self.keys, places, strict=True))
                seen = Evaluator(leaves, {}, torch.float32)(term).expand(len(rows), tokens)
                seen = _in_runs(seen, tile_rows)
                some, every = some & seen.any(1), every & seen.all(1)
            made.append(words_of(torch.stack([some, every], -2), BLOCK))
        return torch.cat(made)

    def _slices(self, tokens: int, tile_rows: int) -> Iterator[torch.Tensor]:
        most = tile_rows * max(1, (1 << 22) // (tokens * (tile_rows if self.mixed else 1)))
        return (torch.arange(n, min(n + most, tokens)) for n in range(0, tokens, most))


def _in_runs(seen: torch.Tensor, rows: int) -> torch.Tensor:
    """(N, keys) -> (runs of `rows`, rows, keys); the last run repeats its last row."""
    short = -len(seen) % rows
    return torch.cat([seen, seen[-1:].expand(short, -1)]).reshape(-1, rows, seen.shape[-1])


def visited(a: Attention, bounds: Bounds, tile_rows: int) -> float:
    """Keys that a row's tile visits, on average, where sizes are 1 and what reads data shows all keys."""
    whole = float(a.j.extent.value) if isinstance(a.j.extent, Const) else float("inf")
    if loads(*(n for x in bounds.visit for n in x.expressions), *(x.expr for x in bounds.rows)):
        return whole
    tiles = simulate(a, bounds, [1] * len(a.sizes), tile_rows=tile_rows)
    keys = sum((_keys_in(x) for x in tiles.visit), torch.zeros(tiles.shape)).clamp(max=whole)
    return float((keys * tiles.rows).sum() / (tiles.rows.sum() * prod(tiles.shape[:-1])))


def _keys_in(x: TileInterval) -> torch.Tensor:
    """About how many keys of an interval its longest stripe leaves."""
    keys = (x.hi - x.lo).clamp(min=0).float()
    if not x.stripes:
        return keys
    step, offset, width = x.stripes[0]
    before, until = (_below(n - offset, step, width) for n in (x.lo, x.hi))
    return torch.where(step - width >= LEAST_GAP, torch.minimum(keys, (until - before).clamp(min=0).float()), keys)


def _below(n: torch.Tensor, step: torch.Tensor, width: torch.Tensor) -> torch.Tensor:
    """How many of the first n numbers are below `width` modulo `step`."""
    return n.div(step, rounding_mode="floor") * width + torch.minimum(torch.remainder(n, step), width)
