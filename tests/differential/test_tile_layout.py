"""Tile order: the attention is the same, and its tiles visit the fewest tiles of keys."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from masks.bounds import blocks, check_sound, visible
from masks.catalogue import neighbourhood
from masks.grids import MASKS, grid

from attncc.ir import Bounds, interpret, parse_expr, verify
from attncc.ir.bounds import Interval
from attncc.passes.bounds.area import area
from attncc.passes.bounds.bounds import loop_bounds
from attncc.passes.rewrites.tile_choice import Terms, tiles_of
from attncc.passes.rewrites.tile_layout import TileOrder, grid_of, tile_layout
from attncc.passes.rewrites.unroll_stripes import unroll_stripes


@pytest.mark.parametrize("name", MASKS)
def test_whole_tiles_are_the_fewest(name: str) -> None:
    mask, shape, tile = MASKS[name]
    a = tile_layout(grid(mask, shape), TileOrder(shape, tile))
    bounds = loop_bounds(a)
    flat = unroll_stripes(a, bounds, tile_rows=64)
    assert len(flat.visit) <= 8
    visited, some, _, _ = check_sound(a, bounds, (), {}, 64)
    assert torch.equal(blocks(visited, 64), blocks(some, 64))
    unrolled, _, _, _ = check_sound(a, flat, (), {}, 64)
    assert torch.equal(blocks(unrolled, 64), blocks(some, 64))


@pytest.mark.parametrize("name", ["2-D, strided", "3-D, sliding tiles"])
def test_fewer_than_in_row_major_order(name: str) -> None:
    mask, shape, tile = MASKS[name]
    a = grid(mask, shape)
    before, after = (
        area(x, loop_bounds(x), tile_rows=64, tile_keys=64) for x in (a, tile_layout(a, TileOrder(shape, tile)))
    )
    assert before.visible == after.visible and after.visited < 0.8 * before.visited


def test_unrolled_bounds_hold_for_other_tiles() -> None:
    mask, shape, tile = MASKS["2-D"]
    a = tile_layout(grid(mask, shape), TileOrder(shape, tile))
    flat = unroll_stripes(a, loop_bounds(a), tile_rows=64)
    for rows in (1, 32, 128, 1024):
        check_sound(a, flat, (), {}, rows)


def test_intervals_without_long_stripes_stay() -> None:
    a = grid("j % 4 == 1", (32, 32))
    bounds = loop_bounds(a)
    assert unroll_stripes(a, bounds) is bounds
    assert isinstance(bounds, Bounds) and isinstance(bounds.visit[0], Interval)


@pytest.mark.parametrize(("shape", "tile"), [((4, 6), (2, 3)), ((2, 4, 6), (1, 2, 2)), ((8,), (4,))])
def test_same_attention(shape: tuple[int, ...], tile: tuple[int, ...]) -> None:
    n = torch.Size(shape).numel()
    a = grid("abs(i % 4 - j % 4) <= 1 or j < 2", shape)
    names = {x.name: x.index for x in a.axes} | {"s": a.score}
    a = replace(a, score=parse_expr("s + float(i - j) * 0.1", names, {}), outputs=("out", "lse", "weights"))
    order = TileOrder(shape, tile)
    after = verify(tile_layout(a, order))
    g = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(2, 4, n, 4, generator=g, dtype=torch.float64) for name in "qkv"}
    wanted = interpret(a, tensors, compute=torch.float64)
    found = interpret(after, {k: order.to_tiles(x, 2) for k, x in tensors.items()}, compute=torch.float64)
    torch.testing.assert_close(order.from_tiles(found["out"], 2), wanted["out"])
    torch.testing.assert_close(order.from_tiles(found["lse"], 2), wanted["lse"])
    torch.testing.assert_close(order.from_tiles(order.from_tiles(found["weights"], 2), 3), wanted["weights"])
    moved = visible(after, (), {})
    assert torch.equal(order.from_tiles(order.from_tiles(moved, 2), 3), visible(a, (), {}))


def test_the_grid_is_read_off_the_mask() -> None:
    for mask, shape, _ in MASKS.values():
        assert grid_of(grid(mask, shape)) == shape
    assert grid_of(grid("(i - j) % 4 == 0 and abs(i - j) <= 60", (32, 32))) == (256, 4)
    assert grid_of(grid("i % 4 == j % 4 and abs(i // 4 - j // 4) <= 9", (32, 32))) == (256, 4)
    assert grid_of(grid("i // 32 == j // 32 and j <= i", (32, 32))) is None
    assert grid_of(grid("j <= i", (32, 32))) is None
    assert grid_of(grid("(j // 64 + h) % 4 == 0", (32, 32))) is None


def test_tiles_hold_one_residue_of_a_dilation() -> None:
    y, x = (neighbourhood(f"i {how} 32", f"j {how} 32", 32, 7, 1, 2) for how in ("//", "%"))
    a = grid(f"{y} and {x}", (32, 32))
    best = tiles_of(Terms(a, grid_of(a) or ()), 64)[0]
    assert grid_of(a) == (16, 2, 16, 2) and best[1] == best[3] == 1


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="do not divide"):
        TileOrder((6, 6), (4, 4))
    with pytest.raises(ValueError, match="not the 64"):
        tile_layout(grid("j <= i", (6, 6)), TileOrder((8, 8), (4, 4)))


# Windows and strides that tiles fit perfectly, as used on image and video generators: a tile visits as many keys as its
# rows see, so the analytical bound total / visited is that of the arithmetic, tokens / window.
PERFECT = [
    ((256, 256), (80, 80), (16, 16), (16, 16), 10.24),
    ((16, 44, 80), (16, 32, 48), (1, 8, 16), (4, 4, 16), 2.2917),
]


@pytest.mark.parametrize(("shape", "window", "stride", "tile", "bound"), PERFECT)
def test_analytical_bound_of_neighbourhoods(
    shape: tuple[int, ...], window: tuple[int, ...], stride: tuple[int, ...], tile: tuple[int, ...], bound: float
) -> None:
    after = [torch.Size(shape[n + 1 :]).numel() for n in range(len(shape))]
    parts = [(f"i // {s} % {n}", f"j // {s} % {n}") for s, n in zip(after, shape, strict=True)]
    terms = [neighbourhood(*p, n, w, s) for p, n, w, s in zip(parts, shape, window, stride, strict=True)]
    a = tile_layout(grid(" and ".join(terms), shape), TileOrder(shape, tile))
    tokens = torch.Size(tile).numel()
    found = area(a, unroll_stripes(a, loop_bounds(a), tile_rows=tokens), tile_rows=tokens, tile_keys=tokens)
    assert found.total / found.visited == pytest.approx(bound, rel=1e-4)
