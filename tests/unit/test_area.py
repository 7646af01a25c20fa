"""The area counter against counting, and the picture."""

from __future__ import annotations

import pytest
import torch
from masks.bounds import attention, blocks, data, tiled, visible

from attncc.passes.bounds import area as area_module
from attncc.passes.bounds.area import Area, area, picture
from attncc.passes.bounds.bounds import loop_bounds
from attncc.passes.tables.spans import spanned, tables

MASKS = [
    "0 <= j", "j <= i", "j <= i and i - j <= 20", "j < P or j <= i", "abs(i - j) <= 20 or i < 10 or j < 10",
    "i // 32 == j // 32 and j <= i", "h < 2 or (j <= i and i - j < 16)", "j < len[b]", "j < 0", "j % 4 == h",
    "start[b, i] <= j", "dense[b, i, j]", "j <= i and pad[b, j]", "j <= i and (i - j < 16 or (j // 8 + h) % 4 == 0)",
]  # fmt: skip


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("sizes", [(2, 70, 70, 11), (1, 50, 130, 64), (2, 1, 90, 40)])
def test_visible_and_total(mask: str, sizes: tuple[int, int, int, int]) -> None:
    a, tensors = attention(mask), data(*sizes[:3])
    dense = visible(a, sizes, tensors)
    found = area(a, loop_bounds(a), sizes, tensors)
    assert found.visible == int(dense.sum())
    assert found.total == dense.numel()
    assert found.visible <= found.visited <= found.total


@pytest.mark.parametrize("mask", [m for m in MASKS if "dense" not in m and "pad" not in m and "start" not in m])
@pytest.mark.parametrize("tile_rows, tile_keys", [(1, 1), (16, 1), (16, 16), (64, 32)])
def test_visited_is_what_tiles_cannot_avoid(mask: str, tile_rows: int, tile_keys: int) -> None:
    sizes = (2, 70, 100, 11)
    a, tensors = attention(mask), data(*sizes[:3])
    some = tiled(visible(a, sizes, tensors), tile_rows, "any")
    keys = blocks(some, tile_keys).repeat_interleave(tile_keys, -1)[..., : some.shape[-1]].sum(-1)
    rows = torch.tensor([min(tile_rows, 70 - first) for first in range(0, 70, tile_rows)])
    assert area(a, loop_bounds(a), sizes, tensors, tile_rows, tile_keys).visited == int((keys * rows).sum())


def test_documents_visit_what_is_visible_with_their_table() -> None:
    sizes = (2, 128, 128, 0)
    a, tensors = attention("doc[b, min(i, M - 1)] == doc[b, j] and j <= i"), data(2, 128, 128)
    found = spanned(a)
    tensors |= tables(found, tensors, sizes)
    measured = area(found.attention, found.bounds, sizes, tensors, tile_rows=1)
    assert measured.visited == measured.visible < area(a, loop_bounds(a), sizes, tensors, tile_rows=1).visited


def test_large_closed_forms_make_nothing_square(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(area_module, "MOST_PAIRS", 0)
    a = attention("j <= i and i - j < 4096")
    n = 1 << 17
    found = area(a, loop_bounds(a), (1, n, n, 0), None, 128)
    assert found.visible == 4 * (4096 * n - 4096 * 4095 // 2)
    assert found.total == 4 * n * n
    assert found.most_speedup == pytest.approx(n / 4096, rel=0.02)


def test_unknown_without_its_data() -> None:
    a = attention("j <= i and pad[b, j]")
    assert area(a, loop_bounds(a), (1, 8, 8, 0)) == Area(None, 4 * 64, 4 * 64)
    assert area(a, loop_bounds(a), (1, 8, 8, 0), tile_rows=1) == Area(None, 4 * 36, 4 * 64)


def test_picture() -> None:
    assert picture(attention("j <= i"), (1, 64, 64, 0), 8) == (
        "▓░      \n██▓░    \n████▓░  \n██████▓░"
    )  # fmt: skip
    text = picture(attention("abs(i - j) <= 100 or j < 200"), (1, 4096, 4096, 0), 32)
    assert len(text.splitlines()) == 16 and all(len(line) == 32 and line[0] == "█" for line in text.splitlines())
    assert picture(attention("pad[b, j] and j <= i"), (1, 64, 64, 0), 8) == picture(
        attention("j <= i"), (1, 64, 64, 0), 8
    )
    assert picture(attention("j < 0"), (1, 4, 4, 0)).strip() == ""
