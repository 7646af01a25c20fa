"""How much of the score matrix a mask leaves, and how much of it a kernel visits.

    visible <= visited <= total        total / visited bounds the speed-up that skipping can give

All three count pairs of a row and a key over every batch point. Nothing of size N x N is made where the bounds of
single rows are exact; otherwise the mask is counted in slices, up to a limit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from attncc.ir import Attention, Axis, Bounds, Expr, Load
from attncc.ir.build import TRUE
from attncc.ir.evaluate import DTYPE_OF, Evaluator
from attncc.ir.interpret import extent, size_table
from attncc.ir.terms import free, loads, walk
from attncc.passes.bounds.bounds import analyse
from attncc.passes.bounds.predicates import map_literals
from attncc.passes.bounds.simulate import count, keys_of, simulate

#: Pairs that are counted one by one when the bounds do not give the number: about a second on one core.
MOST_PAIRS = 1 << 26
_SLICE = 1 << 22


@dataclass(frozen=True)
class Area:
    """Pairs of a row and a key. `visible` is None where it is not known without looking at every pair."""

    visible: int | None
    visited: int
    total: int

    @property
    def most_speedup(self) -> float:
        """total / visible, the most that skipping can give; total / visited where visible is unknown."""
        return self.total / max(self.visited if self.visible is None else self.visible, 1)


def area(
    a: Attention,
    bounds: Bounds,
    sizes: Sequence[int] = (),
    tensors: Mapping[str, torch.Tensor] | None = None,
    tile_rows: int = 64,
    tile_keys: int = 1,
) -> Area:
    """The area of `a` under `bounds` for tiles of `tile_rows` rows that read keys in blocks of `tile_keys`.

    `tensors` holds at least those that the bounds load. Without those that the mask loads, `visible` is None."""
    table = size_table(a, sizes)
    n, m = extent(a.i.extent, table), extent(a.j.extent, table)
    total = n * m
    for axis in a.batch:
        total *= extent(axis.extent, table)
    tiles = simulate(a, bounds, sizes, tensors, tile_rows)
    striped = any(x.stripes or x.bits is not None for x in tiles.visit)
    if striped and prod(tiles.shape) * m <= MOST_PAIRS:
        keys = keys_of(tiles.visit, tiles.shape, m)
        pad = -m % tile_keys
        keys = torch.cat([keys, keys.new_zeros(*keys.shape[:-1], pad)], -1)
        keys = keys.reshape(*keys.shape[:-1], -1, tile_keys).any(-1)
        visited_keys = keys.sum(-1) * tile_keys
        visited_keys -= keys[..., -1] * pad
    else:
        visited_keys = count(tiles.visit, tiles.shape, tile_keys, m)
    visited = int((visited_keys * tiles.rows).sum()) * tiles.repeat
    return Area(_visible(a, sizes, tensors), visited, total)


def _visible(a: Attention, sizes: Sequence[int], tensors: Mapping[str, torch.Tensor] | None) -> int | None:
    if any(x.tensor not in (tensors or {}) for x in loads(a.mask)):
        return None
    rows = analyse(a, rows=True)
    if rows.rows_exact and all(x.stripe is None for x in rows.bounds.visit):
        tiles = simulate(a, rows.bounds, sizes, tensors, 1)
        return int(count(tiles.visit, tiles.shape).sum()) * tiles.repeat
    return _counted(a, sizes, tensors or {})


def _counted(a: Attention, sizes: Sequence[int], tensors: Mapping[str, torch.Tensor]) -> int | None:
    """The mask evaluated slice by slice, None above MOST_PAIRS."""
    table = size_table(a, sizes)
    n, m = extent(a.i.extent, table), extent(a.j.extent, table)
    used = free(a.mask)
    batch = [x for x in a.batch if x.index in used]
    counts = [extent(x.extent, table) for x in batch]
    if prod(counts) * n * m > MOST_PAIRS:
        return None
    repeat = prod([extent(x.extent, table) for x in a.batch if x.index not in used])
    step = max(1, _SLICE // max(1, prod(counts) * m))
    found = 0
    for first in range(0, n, step):
        rows = torch.arange(first, min(first + step, n))
        found += int(mask_at(a, a.mask, table, tensors, batch, counts, rows, torch.arange(m)).sum())
    return found * repeat


def mask_at(
    a: Attention,
    mask: Expr,
    table: Mapping[Expr, int],
    tensors: Mapping[str, torch.Tensor],
    batch: Sequence[Axis],
    counts: Sequence[int],
    rows: torch.Tensor,
    keys: torch.Tensor,
) -> torch.Tensor:
    """`mask` at given rows and keys, (*counts, rows, keys); batch axes that are not in `batch` stand at 0."""
    device = next((t.device for t in tensors.values()), rows.device)
    leaves: dict[Expr, torch.Tensor] = {s: torch.tensor(v, device=device) for s, v in table.items()}
    leaves |= {x.index: torch.zeros((), dtype=torch.int64, device=device) for x in a.batch}
    for at, axis in enumerate(x for x in a.batch if x in batch):
        view = [1] * (len(counts) + 2)
        view[at] = -1
        leaves[axis.index] = torch.arange(counts[at], device=device).view(view)
    leaves[a.i.index], leaves[a.j.index] = rows.to(device)[:, None], keys.to(device)
    value = Evaluator(leaves, tensors, DTYPE_OF[a.compute_dtype])(mask)
    return value.expand(*counts, len(rows), len(keys))


_SHADES = " ░▒▓█"
_SAMPLES = 4


def picture(
    a: Attention, sizes: Sequence[int] = (), width: int = 48, tensors: Mapping[str, torch.Tensor] | None = None
) -> str:
    """The mask of the first batch point, at most `width` characters wide: darker is more visible.

    Each character samples a few pairs. Where the mask reads tensors that are not given, it is drawn as if they allowed
    everything."""
    table = size_table(a, sizes)
    n, m = extent(a.i.extent, table), extent(a.j.extent, table)
    given = tensors or {}

    columns = min(width, m)
    lines = max(1, min(n, round(columns * n / m / 2), width))
    mask = with_known_loads(a.mask, given)
    rows, keys = sampled(n, lines), sampled(m, columns)
    seen = mask_at(a, mask, table, given, (), (), rows.flatten(), keys.flatten()).float()
    cells = seen.view(*rows.shape, *keys.shape).mean((1, 3))
    shades = (cells * (len(_SHADES) - 1)).ceil().to(torch.int64).clamp(max=len(_SHADES) - 1)
    return "\n".join("".join(_SHADES[int(x)] for x in line) for line in shades)


def with_known_loads(mask: Expr, tensors: Mapping[str, torch.Tensor]) -> Expr:
    """`mask` as if what reads other tensors allowed everything."""

    def known(literal: Expr) -> Expr:
        return TRUE if any(isinstance(x, Load) and x.tensor not in tensors for x in walk(literal)) else literal

    return map_literals(mask, known)


def sampled(count_of: int, cells: int) -> torch.Tensor:
    """(cells, samples) positions, spread evenly over each cell."""
    at = torch.arange(cells)[:, None] + (torch.arange(_SAMPLES) + 0.5) / _SAMPLES
    return (at * count_of / cells).to(torch.int64).clamp(max=count_of - 1)
