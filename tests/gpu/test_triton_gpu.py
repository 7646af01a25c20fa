"""The Triton kernels on a GPU. Skipped without one; everything else of them is proven without."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

from triton_kernels.cases import CASES, make

from attncc.codegen.triton import configs, emit, reads_by_key
from attncc.ir import Attention, interpret
from attncc.ir.evaluate import DTYPE_OF
from attncc.passes.bounds.bounds import loop_bounds
from attncc.runtime.triton_launch import TritonKernel, capability_of

DEVICE = torch.device("cuda")


def kernel(
    a: Attention, most: int = 1, remember: dict[str, str] | None = None, *, lists: bool = False
) -> TritonKernel:
    bounds = loop_bounds(a, rows=True)
    space = configs(a, bounds, capability_of(DEVICE), lists=lists)
    return TritonKernel([emit(a, bounds, c) for c in space[:most]], remember=remember)


def outputs_of(a: Attention, like: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    def dtype(name: str) -> torch.dtype:
        return torch.float32 if name == "lse" else DTYPE_OF[a.dtype]

    return [torch.full(like[n].shape, 777.0, dtype=dtype(n), device=DEVICE) for n in a.outputs]


#: Cases whose tables have as many blocks as the case has rows.
FIXED = ("rectangles", "block table", "causal block table", "pages")


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("name", CASES)
def test_against_the_oracle(name: str, dtype: str) -> None:
    check(name, dtype)


@pytest.mark.parametrize("name", [n for n in CASES if reads_by_key(make(n).attention)])
def test_block_lists_against_the_oracle(name: str) -> None:
    check(name, "bf16", lists=True)


@pytest.mark.parametrize("at", range(9))
@pytest.mark.parametrize("name", ["causal", "documents", "window and columns"])
def test_every_configuration_against_the_oracle(name: str, at: int) -> None:
    check(name, "bf16", at=at)


def check(name: str, dtype: str, *, lists: bool = False, at: int = 0) -> None:
    """At lengths of several blocks; the error is at most a few times what eager torch makes in the same dtype."""
    case = CASES[name]
    a, host, sizes = make(name, rows=1 if case.rows == 1 else 0 if name in FIXED else 300,
                          keys=1000 if case.rows == 1 and name not in FIXED else 0, dtype=dtype)  # fmt: skip
    bounds = loop_bounds(a, rows=True)
    space = configs(a, bounds, capability_of(DEVICE), lists=lists)
    if at >= len(space):
        pytest.skip("no such configuration")
    run = TritonKernel([emit(a, bounds, space[at])])
    tensors = {n: t.to(DEVICE) for n, t in host.items()}
    exact = interpret(a, tensors, sizes, compute=torch.float64)
    eager = interpret(a, tensors, sizes, rounding=True)
    got = outputs_of(a, exact)
    run([tensors[t.name] for t in a.tensors], sizes, got)
    for name_, value in zip(a.outputs, got, strict=True):
        want, near = exact[name_], eager[name_].double()
        assert torch.equal(torch.isnan(value), torch.isnan(want))
        finite = torch.isfinite(want)
        scale = float(want[finite].abs().max())
        off = float((near - want)[finite].abs().max())
        eps = torch.finfo(value.dtype).eps
        assert float((value.double() - want)[finite].abs().max()) <= 3 * off + 2 * eps * max(1.0, scale)


def test_in_a_graph_the_kernel_reads_lengths_anew() -> None:
    """Captured once, replayed with other cache lengths: bounds are read on the device."""
    a, host, sizes = make("decode", keys=4000)
    tensors = {n: t.to(DEVICE) for n, t in host.items()}
    ordered = [tensors[t.name] for t in a.tensors]
    out = outputs_of(a, interpret(a, tensors, sizes))
    run = kernel(a)
    run(ordered, sizes, out)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(ordered, sizes, out)
    for length in (4000, 17, 1):
        tensors["length"].fill_(length)
        graph.replay()
        torch.cuda.synchronize()
        want = interpret(a, tensors, sizes, compute=torch.float64)["out"]
        error = float((out[0].double() - want).abs().max())
        assert error < 4 * torch.finfo(torch.bfloat16).eps * float(want.abs().max())


def test_in_a_graph_the_lists_are_made_anew() -> None:
    """Which blocks are seen is read on the device at each replay."""
    a, host, sizes = make("causal block table", rows=70)
    tensors = {n: t.to(DEVICE) for n, t in host.items()}
    ordered = [tensors[t.name] for t in a.tensors]
    out = outputs_of(a, interpret(a, tensors, sizes))
    run = kernel(a, lists=True)
    run(ordered, sizes, out)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(ordered, sizes, out)
    for seed in range(3):
        random = torch.Generator().manual_seed(seed)
        tensors["table"].copy_(torch.rand(tensors["table"].shape, generator=random) < 0.5)
        graph.replay()
        torch.cuda.synchronize()
        want = interpret(a, tensors, sizes, compute=torch.float64)["out"]
        error = float((out[0].double() - want).abs().max())
        assert error < 4 * torch.finfo(torch.bfloat16).eps * float(want.abs().max())


def test_a_choice_is_made_once_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATTNCC_TUNE", raising=False)
    a, host, sizes = make("causal", rows=512)
    tensors = {n: t.to(DEVICE) for n, t in host.items()}
    out = outputs_of(a, interpret(a, tensors, sizes))
    remember: dict[str, str] = {}
    kernel(a, most=3, remember=remember)([tensors[t.name] for t in a.tensors], sizes, out)
    assert len(remember) == 1
    before = dict(remember)
    kernel(a, most=3, remember=remember)([tensors[t.name] for t in a.tensors], sizes, out)
    assert remember == before


@pytest.mark.parametrize("name", ["decode", "pages", "documents"])
def test_nothing_waits_for_the_host(name: str) -> None:
    a, host, sizes = make(name)
    tensors = {n: t.to(DEVICE) for n, t in host.items()}
    ordered = [tensors[t.name] for t in a.tensors]
    out = outputs_of(a, interpret(a, tensors, sizes))
    run = kernel(a, lists=name != "decode")
    run(ordered, sizes, out)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(ordered, sizes, out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
