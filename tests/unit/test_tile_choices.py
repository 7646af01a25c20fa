"""What a kernel in tile order remembers of its choices, and that threads may share it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from masks.grids import MASKS, grid

from attncc.ir import Attention, interpret
from attncc.kernels.build import TorchKernel
from attncc.kernels.tile_order import TileOrdered
from attncc.passes.bounds.bounds import loop_bounds
from attncc.passes.rewrites.tile_choice import InTiles, in_tiles
from attncc.runtime.store import Store


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def found() -> tuple[Attention, InTiles]:
    a = grid(MASKS["2-D, strided"][0], (32, 32))
    made = in_tiles(a, loop_bounds(a))
    assert isinstance(made, InTiles)
    return a, made


def kernel(found: tuple[Attention, InTiles], root: Path) -> TileOrdered:
    a, made = found
    return TileOrdered(a, TorchKernel(a), made, TorchKernel(made.attention), lambda: Store(root))


def inputs(a: Attention, seed: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(1, 1, 32 * 32, 4, generator=g) for _ in a.tensors]
    named = {t.name: x for t, x in zip(a.tensors, tensors, strict=True)}
    return tensors, interpret(a, named, [])["out"]


def test_threads(found: tuple[Attention, InTiles], tmp_path: Path) -> None:
    """Some measure, some wait, each gets its own result."""
    shared = kernel(found, tmp_path)

    def run(seed: int) -> float:
        tensors, wanted = inputs(found[0], seed)
        out = torch.empty_like(wanted)
        worst = 0.0
        for _ in range(2):
            shared(tensors, [], [out.zero_()])
            worst = max(worst, float((out - wanted).abs().max()))
        return worst

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(run, range(6))) < 1e-5


def test_choices_are_bounded_and_know_their_threads(
    found: tuple[Attention, InTiles], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def measured(*_: Sequence[object]) -> bool:
        asked.append(torch.get_num_threads())
        return True

    shared = kernel(found, tmp_path)
    monkeypatch.setattr(shared._faster, "most", 2)
    monkeypatch.setattr(shared, "_measured", measured)
    tensors, wanted = inputs(found[0], 0)
    for threads in (1, 2, 1, 2, 3, 1):
        torch.set_num_threads(threads)
        shared(tensors, [], [torch.empty_like(wanted)])
        assert len(shared._faster) <= 2
    assert asked == [1, 2, 3, 1]


def test_what_was_not_measured_is_not_remembered(
    found: tuple[Attention, InTiles], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = kernel(found, tmp_path)
    monkeypatch.setattr(shared, "_measured", lambda *_: False)
    tensors, wanted = inputs(found[0], 0)
    monkeypatch.setenv("ATTNCC_TUNE", "off")
    shared(tensors, [], [torch.empty_like(wanted)])
    assert "keys" in shared.note and "slower" not in shared.note
    monkeypatch.delenv("ATTNCC_TUNE")
    shared(tensors, [], [torch.empty_like(wanted)])
    assert "slower" in shared.note
