"""A kernel is found again only by what it was made for: nothing that is read to make one is left out of the key."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from masks.bounds import attention
from masks.grids import MASKS, grid

from attncc.ir import Attention, Bounds, print_attention
from attncc.kernels import build
from attncc.kernels.build import Built, Target, TorchKernel, built, find_toolchain
from attncc.kernels.tile_order import TileOrdered

DENSE = print_attention(attention("j <= i"))


@pytest.fixture(autouse=True)
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of different kinds; kernels are emitted for them and never run."""
    kinds = {0: "sm_80", 1: "sm_90", None: "sm_80"}
    monkeypatch.setattr(build, "capability_of", lambda device: kinds[device.index])


@contextmanager
def precision(value: str) -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = value
    try:
        yield
    finally:
        matmul.fp32_precision = before


def test_each_kind_of_gpu_has_its_own() -> None:
    first, second = built(DENSE, "cuda:0"), built(DENSE, "cuda:1")
    assert (first.name, second.name) == ("Triton sm_80 kernel", "Triton sm_90 kernel")
    assert built(DENSE, "cuda:0") is first and built(DENSE, "cuda") is first


def test_tf32_is_what_it_is_when_the_kernel_is_made() -> None:
    with precision("tf32"):
        fast = built(DENSE, "cuda:0")
    exact = built(DENSE, "cuda:0")
    assert '"tf32"' in fast.source and '"tf32"' not in exact.source
    with precision("tf32"):
        assert built(DENSE, "cuda:0") is fast


def test_the_older_names_of_the_precision_are_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = built(DENSE, "cuda:0")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert built(DENSE, "cuda:0") is not exact
        torch.backends.cuda.matmul.allow_tf32 = False
        assert built(DENSE, "cuda:0") is exact
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_instruction_set_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    own = built(DENSE, "cpu")
    if own.language != "cpp":
        pytest.skip(own.reason)
    monkeypatch.setenv("ATTNCC_ISA", "avx3")
    wrong = built(DENSE, "cpu")
    assert wrong.language == "torch" and "ATTNCC_ISA='avx3'" in wrong.reason
    monkeypatch.delenv("ATTNCC_ISA")
    assert built(DENSE, "cpu") is own


def test_the_compiler_that_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = find_toolchain()
    other = tmp_path / "other-g++"
    other.write_text("#!/bin/sh\nexit 1\n")
    other.chmod(0o755)
    monkeypatch.setenv("ATTNCC_CXX", str(other))
    toolchain = find_toolchain()
    assert toolchain is not None and toolchain.path == str(other)
    monkeypatch.delenv("ATTNCC_CXX")
    assert find_toolchain() == found


def test_the_store_that_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ATTNCC_CACHE_DIR", str(tmp_path / "one"))
    first = build.default_store()
    assert first.root.is_relative_to(tmp_path / "one") and build.default_store() is first
    monkeypatch.setenv("ATTNCC_CACHE_DIR", str(tmp_path / "two"))
    assert build.default_store().root.is_relative_to(tmp_path / "two")


def test_the_mode_of_the_first_user_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the default device nor inference mode decide where a kernel's own tables lie."""

    def compiled(a: Attention, bounds: Bounds, target: Target, *_: object) -> Built:
        return Built(TorchKernel(a), "", "cpp", "stands for a C++ kernel")

    monkeypatch.setattr(build, "_cpp", compiled)
    text = print_attention(grid(MASKS["2-D, strided"][0], (32, 32)))
    build._built.cache_clear()
    with torch.device("meta"), torch.inference_mode():
        kernel = built(text, "cpu").kernel
    build._built.cache_clear()
    assert isinstance(kernel, TileOrdered)
    assert kernel.found.table.device.type == "cpu" and not kernel.found.table.is_inference()
