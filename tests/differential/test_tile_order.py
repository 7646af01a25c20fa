"""Models over grids of tokens, compiled: the numbers of eager, in tile order where that visits fewer keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from masks.bounds import blocks, check_sound
from masks.grid_models import Ball, Grid, Halo, Meshed, Neighbourhood, Padded, Windows
from masks.grids import MASKS, grid

from attncc.driver.backend import Collected, collecting
from attncc.ir import print_attention
from attncc.kernels.build import built
from attncc.kernels.tile_order import TileOrdered
from attncc.passes.bounds.bounds import loop_bounds
from attncc.passes.rewrites.tile_choice import InTiles, in_tiles
from attncc.report.site import Site

MODELS: dict[str, Grid] = {
    "2-D": Neighbourhood((64, 64), (7, 7)),
    "2-D, from meshgrid": Meshed((64, 64), (7, 7)),
    "2-D, dilated": Neighbourhood((48, 48), (5, 5), dilation=4),
    "2-D, strided": Neighbourhood((48, 48), (12, 12), stride=4),
    "2-D, even window": Neighbourhood((64, 64), (8, 8)),
    "1-D, dilated": Neighbourhood((2304,), (15,), dilation=8),
    "video, causal in time": Neighbourhood((4, 24, 24), (2, 5, 5), dilation=2, causal=1),
    "video, sliding tiles": Neighbourhood((8, 24, 16), (2, 8, 8), stride=2),
    "halo": Halo((48, 48), 8, 3),
    "windows": Windows((48, 48), 8),
    "within a distance": Ball((64, 64)),
    "padded": Padded((64, 64), (7, 7)),
}


@pytest.fixture(autouse=True)
def always_in_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The choice by time is left out, so that what is tested is what runs."""
    monkeypatch.setenv("ATTNCC_TUNE", "off")
    torch._dynamo.reset()
    yield


def compiled(f: Callable[..., torch.Tensor], *args: torch.Tensor) -> tuple[torch.Tensor, Site]:
    """The result of the one site of `f`, fused without being measured, and the site."""
    found = Collected()
    token = collecting.set(found)
    try:
        result = torch.compile(f, backend="attncc", options={"inductor": False, "measure": False})(*args)
    finally:
        collecting.reset(token)
    (site,) = found.sites
    return result, site


QUICK = ("2-D, from meshgrid", "video, causal in time")


@pytest.mark.parametrize("name", [pytest.param(x, marks=[] if x in QUICK else pytest.mark.full) for x in MODELS])
def test_models_in_tile_order(name: str) -> None:
    model = MODELS[name].eval()
    x = model.example()
    with torch.no_grad():
        found, site = compiled(model, x)
        assert "tokens in tiles of" in site.became
        assert isinstance(built(site.ir or "", "cpu").kernel, TileOrdered)
        exact = model.double()(x.double())
        eager = model.float()(x)
    error, allowed = (found - exact).abs().max(), (eager - exact).abs().max()
    assert error <= 3 * allowed + 1e-7, (error, allowed)


def test_inspection_counts_what_is_visited() -> None:
    model = MODELS["2-D, dilated"].eval()
    with torch.no_grad():
        _, site = compiled(model, model.example())
    assert site.visible is not None and site.visited is not None and site.total is not None
    assert site.visible <= site.visited < 0.2 * site.total


def test_dynamic_grids_are_refused_with_the_reason() -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, side: torch.Tensor) -> torch.Tensor:
        w = side.shape[0]
        t = torch.arange(q.shape[-2])
        y, x = t // w, t % w
        mask = ((y[:, None] - y[None]).abs() <= 3) & ((x[:, None] - x[None]).abs() <= 3)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    args = [torch.randn(1, 2, 2304, 16) for _ in range(3)] + [torch.zeros(48)]
    torch._dynamo.mark_dynamic(args[3], 0)
    found, site = compiled(attend, *args)
    assert "not in tile order" in site.became and "known at the call" in site.became
    torch.testing.assert_close(found, attend(*args), rtol=1e-5, atol=2e-6)


def test_choice_by_time_gives_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATTNCC_TUNE")
    model = MODELS["2-D, dilated"].eval()
    x = model.example()
    with torch.no_grad():
        found = torch.compile(model, backend="attncc", options={"inductor": False, "measure": False})(x)
        torch.testing.assert_close(found, model(x), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", MASKS)
def test_tables_hold_exactly_what_tiles_see(name: str) -> None:
    mask, shape, _ = MASKS[name]
    a = grid(mask, shape)
    for rows in (64, 32):
        found = in_tiles(a, loop_bounds(a), rows)
        if not isinstance(found, InTiles):
            assert isinstance(found, str) and "no gain" in found
            continue
        tensors = {found.attention.tensors[-1].name: found.table}
        visited, some, full, every = check_sound(found.attention, found.bounds, (), tensors, rows)
        assert torch.equal(blocks(visited, 16), blocks(some, 16))
        assert torch.equal(blocks(full, 16, "all"), blocks(every, 16, "all"))


def test_what_cannot_be_moved_stays() -> None:
    a = grid(MASKS["2-D, strided"][0], (32, 32))
    text = print_attention(a).replace("score  s", "score  s + q[b, h, j, 0]")
    made = built(text, "cpu")
    assert "is read by the score" in made.shown and not isinstance(made.kernel, TileOrdered)
