"""Gradients from the kept sums of rows equal the interpreter's, for every form that the backward knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_ir import Program, programs

from attncc.codegen import torch_backward
from attncc.codegen.torch_backward import backward, kept
from attncc.codegen.torch_form import run_blocked
from attncc.ir import Attention, interpret, parse_attention
from attncc.passes.bounds.bounds import loop_bounds

many = settings(
    max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


def with_sums(a: Attention) -> Attention:
    """The same attention as it is trained: it gives its output, and the sums of its rows."""
    return replace(a, outputs=("out", "lse") if a.normalizer == "softmax" else ("out",))


def both(
    a: Attention, tensors: dict[str, torch.Tensor], sizes: Sequence[int], *, skip: bool, wanted: Sequence[bool]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The gradients, and the interpreter's."""
    leaves = {n: t.detach().clone().requires_grad_(w) for (n, t), w in zip(tensors.items(), wanted, strict=True)}
    outputs = list(interpret(a, leaves, sizes).values())
    random = torch.Generator().manual_seed(7)
    seeds = [torch.randn(o.shape, generator=random, dtype=torch.float64).to(o.dtype) for o in outputs]
    # where a row is empty its sum is -inf, and nothing depends on that
    seeds = [torch.where(o.isfinite(), s, 0.0) for o, s in zip(outputs, seeds, strict=True)]
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
        got = backward(a, seeds, values, [given[n] for n in names], sizes, wanted, bounds=bounds)
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
