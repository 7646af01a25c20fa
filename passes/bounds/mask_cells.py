"""A mask in cells: of each, whether its pairs of row and key are visible, and whether a kernel's loop visits them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from attncc.ir import Attention, Bounds
from attncc.ir.interpret import extent, size_table
from attncc.passes.bounds.area import mask_at, sampled, with_known_loads
from attncc.passes.bounds.bounds import loop_bounds
from attncc.passes.bounds.simulate import simulate

#: What a cell is: neither visible nor visited; visited, but no pair visible; some pairs visible; all of them.
SKIPPED, WASTED, PARTIAL, VISIBLE = range(4)


def mask_cells(
    a: Attention,
    sizes: Sequence[int] = (),
    most: int = 256,
    tensors: Mapping[str, torch.Tensor] | None = None,
    tile_rows: int = 64,
    bounds: Bounds | None = None,
) -> torch.Tensor:
    """The classes of cells of the first batch point, uint8[rows, keys], at most `most` each way: exact where a cell is
    one pair, otherwise from a few pairs of each. The loop is that of tiles of `tile_rows` rows under `bounds`, those
    that the mask gives where none are given.

    Where mask and bounds read tensors that are not given, they are taken to allow everything."""
    given = tensors or {}
    a = replace(a, mask=with_known_loads(a.mask, given))
    table = size_table(a, sizes)
    n, m = extent(a.i.extent, table), extent(a.j.extent, table)
    rows, keys = sampled(n, min(n, most)), sampled(m, min(m, most))
    seen = mask_at(a, a.mask, table, given, (), (), rows.flatten(), keys.flatten())
    visited = _visited(a, bounds or loop_bounds(a), sizes, given, tile_rows, rows.flatten(), keys.flatten())
    shape = (*rows.shape, *keys.shape)
    seen, visited = seen.reshape(shape), visited.reshape(shape)
    cells = torch.where(visited.any(3).any(1), WASTED, SKIPPED)
    cells[seen.any(3).any(1)] = PARTIAL
    cells[seen.all(3).all(1)] = VISIBLE
    return cells.to(torch.uint8)


def _visited(
    a: Attention, bounds: Bounds, sizes: Sequence[int], tensors: Mapping[str, torch.Tensor], tile_rows: int,
    rows: torch.Tensor, keys: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Whether the tile of each row visits each key, bool[rows, keys]."""
    tiles = simulate(a, bounds, sizes, tensors, tile_rows)
    first = (0,) * (len(tiles.shape) - 1)
    at = rows // tile_rows
    found = torch.zeros(len(rows), len(keys), dtype=torch.bool)
    for x in tiles.visit:
        here = (keys >= x.lo[first][at][:, None]) & (keys < x.hi[first][at][:, None])
        for stripe in x.stripes:
            step, offset, width = (n[first][at][:, None] for n in stripe)
            here &= torch.remainder(keys - offset, step) < width
        found |= here if x.bits is None else here & x.bits[first][at][:, keys]
    return found
