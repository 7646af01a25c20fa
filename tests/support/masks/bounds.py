"""Masks for the tests of loop bounds, as text, with the brute force they are held against."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch

from attncc.ir import Attention, Bounds, parse_attention, verify
from attncc.ir.evaluate import Evaluator
from attncc.ir.interpret import extent, size_table
from attncc.passes.bounds.simulate import full_keys, keys_of, simulate

DATA = """
tensor doc: i64[B, M]
tensor len: i64[B]
tensor pos: i64[N]
tensor start: i64[B, N]
tensor pad: bool[B, M]
tensor ok: bool[B, N]
tensor blocks: bool[4, 8, 8]
tensor dense: bool[B, N, M]
"""


def attention(mask: str, n: str = "N", m: str = "M", h: int = 4) -> Attention:
    return verify(
        parse_attention(f"""attention
size   B, N, M, P
batch  b = B, h = {h}
axis   i = {n}, j = {m}, d = 8, e = 8
tensor q: f32[B, {h}, {n}, 8]
tensor k: f32[B, {h}, {m}, 8]
tensor v: f32[B, {h}, {m}, 8]
{DATA}
q      q[b, h, i, d]
k      k[b, h, j, d]
v      v[b, h, j, e]
score  s
mask   {mask}
norm   softmax
empty  zero
weight w
give   out
dtype  f32
""")
    )


def data(b: int, n: int, m: int, seed: int = 0, h: int = 4) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    cuts = torch.sort(torch.randint(0, 4, (b, m), generator=g)).values
    left = torch.randint(0, max(m // 2, 1), (b, 1), generator=g)
    return {
        "q": torch.randn(b, h, n, 8, generator=g),
        "k": torch.randn(b, h, m, 8, generator=g),
        "v": torch.randn(b, h, m, 8, generator=g),
        "doc": cuts,
        "len": torch.randint(0, m + 1, (b,), generator=g),
        "pos": torch.arange(n) + max(m - n, 0),
        "start": torch.randint(0, m, (b, n), generator=g),
        "pad": torch.arange(m) >= left,
        "ok": torch.rand(b, n, generator=g) > 0.3,
        "blocks": torch.rand(4, 8, 8, generator=g) > 0.6,
        "dense": torch.rand(b, n, m, generator=g) > 0.5,
    }


def visible(a: Attention, sizes: Sequence[int], tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The mask, dense: (*batch, N, M)."""
    table = size_table(a, sizes)
    axes = (*a.batch, a.i, a.j)
    leaves = {s: torch.tensor(v) for s, v in table.items()}
    for at, axis in enumerate(axes):
        view = [1] * len(axes)
        view[at] = -1
        leaves[axis.index] = torch.arange(extent(axis.extent, table)).view(view)
    value = Evaluator(leaves, tensors, torch.float32)(a.mask)
    return value.expand([extent(x.extent, table) for x in axes])


def tiled(mask: torch.Tensor, rows: int, how: str) -> torch.Tensor:
    """(*batch, tiles, M): whether any row, or every row, of a tile sees a key."""
    parts = mask.split(rows, -2)
    return torch.stack([p.any(-2) if how == "any" else p.all(-2) for p in parts], -2)


def blocks(keys: torch.Tensor, size: int, how: str = "any") -> torch.Tensor:
    parts = keys.split(size, -1)
    return torch.stack([p.any(-1) if how == "any" else p.all(-1) for p in parts], -1)


def check_sound(
    a: Attention, bounds: Bounds, sizes: Sequence[int], tensors: Mapping[str, torch.Tensor], tile_rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Asserts that `visit` covers and `full` is covered. Returns keys (visited, some row sees, full, all rows see)."""
    mask = visible(a, sizes, tensors)
    some, every = tiled(mask, tile_rows, "any"), tiled(mask, tile_rows, "all")
    tiles = simulate(a, bounds, sizes, tensors, tile_rows)
    visited = keys_of(tiles.visit, tiles.shape, mask.shape[-1]).expand_as(some)
    full = full_keys(tiles, mask.shape[-1]).expand_as(some)
    assert bool((visited | ~some).all()), f"a visible key is not visited: {a.mask}"
    assert bool((every | ~full).all()), f"a hidden key counts as full: {a.mask}"
    return visited, some, full, every


def grid(*options: Sequence[object]) -> list[tuple[object, ...]]:
    return list(itertools.product(*options))
