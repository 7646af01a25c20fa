"""Loop bounds evaluated in torch for all tiles at once: what a kernel computes before its key loop, as tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch

from attncc.ir import Attention, Bounds, Expr, Interval
from attncc.ir.bounds import TILE_HI, TILE_LO, Bits, Stripe
from attncc.ir.evaluate import DTYPE_OF, Evaluator
from attncc.ir.interpret import extent, size_table
from attncc.ir.terms import free
from attncc.passes.bounds.block_maps import keys_in


@dataclass(frozen=True)
class TileInterval:
    """Keys lo <= j < hi of every tile, clipped to [0, M), and (step, offset, width) of each of its stripes, all of the
    shape (*batch, tiles); and `bits`, (*batch, tiles, M), outside of which there are none."""

    lo: torch.Tensor
    hi: torch.Tensor
    stripes: tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], ...] = ()
    bits: torch.Tensor | None = None


@dataclass(frozen=True)
class Tiles:
    """`visit`, `full` and `hidden` of all tiles. Batch axes that the bounds do not mention have extent 1; `repeat` is
    how many batch points stand for one. `rows` is the number of rows of each tile."""

    visit: tuple[TileInterval, ...]
    full: tuple[TileInterval, ...]
    hidden: tuple[TileInterval, ...] | None
    rows: torch.Tensor
    shape: tuple[int, ...]
    repeat: int


def simulate(
    a: Attention,
    bounds: Bounds,
    sizes: Sequence[int] = (),
    tensors: Mapping[str, torch.Tensor] | None = None,
    tile_rows: int = 64,
) -> Tiles:
    """`bounds` of every tile of `tile_rows` rows. `tensors` holds at least those the bounds load. Raises ValueError
    where a tile has rows of two entries of a table of bits."""
    table = size_table(a, sizes)
    n, m = extent(a.i.extent, table), extent(a.j.extent, table)
    used = free(*bounds.expressions)
    device = next((t.device for t in (tensors or {}).values()), torch.device("cpu"))
    leaves: dict[Expr, torch.Tensor] = {s: torch.tensor(v, device=device) for s, v in table.items()}
    shape: list[int] = []
    repeat = 1
    for at, axis in enumerate(a.batch):
        count = extent(axis.extent, table)
        mentioned = axis.index in used
        repeat *= 1 if mentioned else count
        shape.append(count if mentioned else 1)
        view = [1] * (len(a.batch) + 2)
        view[at] = -1
        leaves[axis.index] = torch.arange(shape[-1], device=device).view(view)
    first = torch.arange(0, n, tile_rows, device=device)
    end = (first + tile_rows).clamp(max=n)
    leaves[TILE_LO], leaves[TILE_HI] = first[:, None], end[:, None]
    if bounds.rows:
        rows = torch.minimum(first[:, None] + torch.arange(tile_rows, device=device), end[:, None] - 1)
        scan = Evaluator({**leaves, a.i.index: rows}, tensors or {}, DTYPE_OF[a.compute_dtype])
        for r in bounds.rows:
            each = scan(r.expr).to(torch.int64) + torch.zeros_like(rows)
            leaves[r.index] = each.amin(-1, keepdim=True) if r.op == "min" else each.amax(-1, keepdim=True)
    ev = Evaluator(leaves, tensors or {}, DTYPE_OF[a.compute_dtype])
    full_shape = (*shape, len(first), 1)

    def value(x: Expr) -> torch.Tensor:
        return ev(x).to(torch.int64).expand(full_shape)[..., 0]

    def stripe(s: Stripe) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return value(s.step), value(s.offset), value(s.width)

    def bits(x: Bits) -> torch.Tensor:
        if n > x.rows and x.rows % tile_rows:
            raise ValueError(f"{x.tensor} has bits for {x.rows} rows, which tiles of {tile_rows} do not divide")
        words = (tensors or {})[x.tensor][tuple(value(i) for i in x.index)]
        return keys_in(words, x.block, m) ^ x.outside

    def all_bits(x: Interval) -> torch.Tensor | None:
        return reduce(torch.logical_and, map(bits, x.bits)) if x.bits else None

    def all_of(intervals: tuple[Interval, ...]) -> tuple[TileInterval, ...]:
        return tuple(
            TileInterval(value(x.lo).clamp(0, m), value(x.hi).clamp(0, m), tuple(map(stripe, x.stripes)), all_bits(x))
            for x in intervals
        )

    full = (*bounds.full, *bounds.full_parts)
    hidden = None if bounds.hidden is None else all_of(bounds.hidden)
    return Tiles(all_of(bounds.visit), all_of(full), hidden, end - first, full_shape[:-1], repeat)


def keys_of(intervals: tuple[TileInterval, ...], shape: tuple[int, ...], m: int) -> torch.Tensor:
    """The union as a boolean (*batch, tiles, m): for tests and small masks only."""
    j = torch.arange(m, device=intervals[0].lo.device if intervals else None)
    inside = torch.zeros(*shape, m, dtype=torch.bool, device=j.device)
    for x in intervals:
        here = (j >= x.lo[..., None]) & (j < x.hi[..., None])
        for s in x.stripes:
            step, offset, width = (n[..., None] for n in s)
            here &= torch.remainder(j - offset, step) < width
        inside |= here if x.bits is None else here & x.bits
    return inside


def full_keys(tiles: Tiles, m: int) -> torch.Tensor:
    """The keys that every row of a tile sees, as a boolean (*batch, tiles, m), as far as bounds tell."""
    found = keys_of(tiles.full, tiles.shape, m)
    return found if tiles.hidden is None else found | ~keys_of(tiles.hidden, tiles.shape, m)


def count(intervals: tuple[TileInterval, ...], shape: tuple[int, ...], block: int = 1, m: int = 0) -> torch.Tensor:
    """Keys in the union per tile, (*batch, tiles), in whole blocks of `block` out of `m`; stripes and bits are not
    applied."""
    if not intervals:
        return torch.zeros(shape, dtype=torch.int64)
    lo = torch.stack([x.lo for x in intervals])
    hi = torch.stack([x.hi for x in intervals])
    empty = hi <= lo
    lo = torch.where(empty, 0, lo // block * block)
    hi = torch.where(empty, 0, -(-hi // block) * block)
    if m:
        hi = hi.clamp(max=m)
    lo, order = lo.sort(0)
    hi = hi.gather(0, order)
    reach = torch.cummax(hi, 0).values
    before = torch.cat([torch.zeros_like(reach[:1]), reach[:-1]])
    return (hi - torch.maximum(lo, before)).clamp(min=0).sum(0)
