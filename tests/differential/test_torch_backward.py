"""Gradients from the kept sums of rows equal the interpreter's, for every form that the backward knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_ir.programs import Program, programs

from attncc.codegen import torch_backward
from attncc.codegen.torch_backward import backward, kept
from attncc.codegen.torch_form import run_blocked
from attncc.ir import Attention, interpret, parse_attention
from attncc.ir.evaluate import DTYPE_OF
from attncc.passes.bounds.bounds import loop_bounds

many = settings(
    max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


def with_sums(a: Attention) -> Attention:
    """The same attention as it is trained: it gives its output, and the sums of its rows."""
    return replace(a, outputs=("out", "lse") if a.normalizer == "softmax" else ("out",))


def both(
    a: Attention, tensors: dict[str, torch.Tensor], sizes: Sequence[int], *, skip: bool, wanted: Sequence[bool],
    of_sums: bool = True,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:  # fmt: skip
    """The gradients, and the interpreter's; with those of the sums of rows or without."""
    leaves = {n: t.detach().clone().requires_grad_(w) for (n, t), w in zip(tensors.items(), wanted, strict=True)}
    outputs = list(interpret(a, leaves, sizes).values())
    random = torch.Generator().manual_seed(7)
    seeds = [torch.randn(o.shape, generator=random, dtype=torch.float64).to(o.dtype) for o in outputs]
    # where a row is empty its sum is -inf, and nothing depends on that
    seeds = [torch.where(o.isfinite(), s, 0.0) for o, s in zip(outputs, seeds, strict=True)]
    seeds = [s if of_sums or n == "out" else torch.zeros_like(s) for n, s in zip(a.outputs, seeds, strict=True)]
    sources = [x for x in leaves.values() if x.requires_grad]
    pairs = [(o, s) for o, s in zip(outputs, seeds, strict=True) if o.requires_grad]
    want = torch.autograd.grad(
        [o for o, _ in pairs], sources, [s for _, s in pairs], allow_unused=True, materialize_grads=True
    )  # fmt: skip
    with torch.no_grad():
        values = list(tensors.values())
        given = dict(zip(a.outputs, run_blocked(a, values, sizes), strict=True))
        names = kept(a)
        assert names is not None
        bounds = loop_bounds(a, rows=True) if skip else None
        got = backward(a, seeds, values, {n: given[n] for n in names}, sizes, wanted, bounds=bounds)
    assert got is not None
    return got, list(want)


def close(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor], unit: float) -> None:
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        assert torch.equal(g.isnan(), w.isnan())
        assert (g - w).abs().nan_to_num(0.0).max() <= 1e3 * unit * (1 + w.abs().nan_to_num(0.0).max())


@many
@given(programs(dtypes=("f64",), longest=12, largest_head=6), st.sampled_from([1, 64, 1 << 18]), st.booleans(),
       st.integers(0, 63), st.sampled_from([1, 3, 64]))  # fmt: skip
def test_gradients_equal_the_interpreters(program: Program, budget: int, skip: bool, mask: int, rows: int) -> None:
    a, tensors, sizes = program
    a = with_sums(a)
    floats = [t.dtype == torch.float64 for t in tensors.values()]
    wanted = [f and bool((mask >> at) & 1) for at, f in enumerate(floats)]
    if kept(a) is None or not any(wanted):
        return
    finite = all(o.isfinite().all() for n, o in interpret(a, tensors, sizes).items() if n == "out")
    if not finite:
        return
    before = torch_backward.BUDGET, torch_backward.ROWS
    torch_backward.BUDGET, torch_backward.ROWS = budget, rows
    try:
        got, want = both(a, tensors, sizes, skip=skip, wanted=wanted)
    finally:
        torch_backward.BUDGET, torch_backward.ROWS = before
    close(got, want, torch.finfo(torch.float64).eps)


PLAIN = """attention
size   B, N
batch  b = B, h = 3
axis   i = N, j = N, d = 16, e = 16
tensor q: {dtype}[B, N, 3, 16]
tensor k: {dtype}[B, 3, N, 16]
tensor v: {dtype}[B, 3, N, 16]
q      q[b, i, h, d]
k      k[b, h, j, d]
v      v[b, h, j, e]
score  s * 0.25
mask   {mask}
norm   softmax
empty  zero
weight w
give   out, lse
dtype  {dtype}
"""


@pytest.mark.parametrize("mask", ["True", "j <= i"])
@pytest.mark.parametrize("of_sums", [False, True])
def test_a_plain_attention_by_torchs_own_backward(mask: str, of_sums: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody asks for the gradient of the sums, which its kernel does not know."""
    calls: list[str] = []
    library = torch_backward._library

    def watched(*args: object) -> object:
        calls.append("called")
        return library(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(torch_backward, "_library", watched)
    a = parse_attention(PLAIN.format(dtype="f64", mask=mask))
    random = torch.Generator().manual_seed(3)
    shapes = ((2, 20, 3, 16), (2, 3, 20, 16), (2, 3, 20, 16))
    tensors = {n: torch.randn(s, generator=random, dtype=torch.float64) for n, s in zip("qkv", shapes, strict=True)}
    got, want = both(a, tensors, [2, 20], skip=True, wanted=[True] * 3, of_sums=of_sums)
    close(got, want, torch.finfo(torch.float64).eps)
    assert calls == ([] if of_sums else ["called"])


CHANNELS_FIRST = """attention
size   B, N
batch  b = B, h = 3
axis   i = N, j = N, d = 16, e = 16
tensor q: f64[B, 3, 16, N]
tensor k: f64[B, 3, 16, N]
tensor v: f64[B, 3, 16, N]
q      q[b, h, d, i]
k      k[b, h, d, j]
v      v[b, h, e, j]
score  s * 0.25
mask   True
norm   softmax
empty  zero
weight w
give   out, lse
dtype  f64
"""


def test_torchs_own_backward_of_channels_that_lie_apart() -> None:
    """Its kernel takes the channels of a row, and of a gradient, to lie side by side."""
    random = torch.Generator().manual_seed(4)
    tensors = {n: torch.randn(2, 3, 16, 20, generator=random, dtype=torch.float64) for n in "qkv"}
    a = parse_attention(CHANNELS_FIRST)
    got, want = both(a, tensors, [2, 20], skip=True, wanted=[True] * 3, of_sums=False)
    close(got, want, torch.finfo(torch.float64).eps)
    outputs = dict(zip(a.outputs, run_blocked(a, list(tensors.values()), [2, 20]), strict=True))
    seeds = [torch.ones(1, dtype=torch.float64).expand_as(outputs["out"]), torch.zeros_like(outputs["lse"])]
    whole = [s.contiguous() for s in seeds]
    results = [backward(a, x, list(tensors.values()), outputs, [2, 20], [True] * 3) for x in (seeds, whole)]
    assert results[0] is not None and results[1] is not None
    close(results[0], results[1], torch.finfo(torch.float64).eps)


LOW = PLAIN.replace("score  s * 0.25", "score  s * 0.25 - float(i - j) * 0.125 * slope[h]").replace(
    "q      q[b", "tensor slope: f32[3]\nq      q[b"
)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("text", [PLAIN, LOW], ids=["plain", "slopes"])
@pytest.mark.parametrize("mask", ["j <= i", "j <= i and i - j < 7"])
def test_gradients_are_as_near_as_eagers(dtype: str, text: str, mask: str) -> None:
    """Within twice the error that eager torch makes in the same types."""
    random = torch.Generator().manual_seed(3)
    shapes = ((2, 70, 3, 16), (2, 3, 70, 16), (2, 3, 70, 16))
    exact = {n: torch.randn(s, generator=random).to(DTYPE_OF[dtype]) for n, s in zip("qkv", shapes, strict=True)}
    if text is LOW:
        exact["slope"] = torch.rand(3, generator=random)
    wide = parse_attention(text.format(dtype="f64", mask=mask).replace("f32", "f64"))
    every = [True] * len(exact)
    _, want = both(wide, {n: x.double() for n, x in exact.items()}, [2, 70], skip=False, wanted=every, of_sums=False)
    own = parse_attention(text.format(dtype=dtype, mask=mask))
    got, eager = both(own, exact, [2, 70], skip=True, wanted=every, of_sums=False)
    for g, e, w in zip(got, eager, want, strict=True):
        scale = w.abs().max()
        assert (g.to(e.dtype) - w).abs().max() <= 2 * (e - w).abs().max() + 4 * torch.finfo(e.dtype).eps * scale
