"""Biases by distance: one small table for all layers, the model's own numbers, and its gradient."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attncc.driver.backend import Collected, collecting
from attncc.driver.recording import report
from attncc.report.model import Report

FAST = {"inductor": False, "measure": False}


def bucket(distance: Tensor, both: bool) -> Tensor:
    """T5's: exact near, logarithmic far."""
    found = torch.zeros_like(distance)
    count = 16
    if both:
        count = 8
        found = found + (distance > 0).to(torch.int64) * count
        distance = distance.abs()
    else:
        distance = -torch.min(distance, torch.zeros_like(distance))
    near = count // 2
    far = near + (torch.log(distance.float() / near) / math.log(64 / near) * (count - near)).to(torch.int64)
    far = torch.min(far, torch.full_like(far, count - 1))
    return found + torch.where(distance < near, distance, far)


def layers(x: Tensor, w: Tensor, table: Tensor, both: bool, keys: int) -> Tensor:
    """Two layers that share a bias, causal where it looks one way."""
    n = x.shape[1]
    distance = torch.arange(keys)[None, :] - torch.arange(n)[:, None]
    bias = table[bucket(distance, both)].permute(2, 0, 1)[None]
    if not both:
        bias = bias.masked_fill(distance > 0, float("-inf"))
    for _ in range(2):
        q, k, v = (t.view(*t.shape[:2], 4, 8).transpose(1, 2) for t in (x @ w).chunk(3, -1))
        weights = (q @ k[:, :, :keys].transpose(-1, -2) + bias).float().softmax(-1).to(x.dtype)
        x = x + (weights @ v[:, :, :keys]).transpose(1, 2).flatten(2)
    return x


def operands(dtype: torch.dtype, gradients: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x, w, table = torch.randn(2, 37, 32), torch.randn(32, 96) / 8, torch.randn(16, 4)
    return x.to(dtype), w.to(dtype), table.to(dtype).requires_grad_(gradients)


def compiled(function: Callable[..., Tensor], *given: Tensor) -> tuple[Report, Tensor]:
    """What became of the function's attention, fused without being measured, and its result."""
    found = Collected()
    token = collecting.set(found)
    torch._dynamo.reset()
    try:
        result = torch.compile(function, backend="attncc", options=FAST)(*given)
        return report(found), result
    finally:
        collecting.reset(token)


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("keys", [37, 29])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_table_holds_a_number_a_distance(both: bool, keys: int, dtype: torch.dtype) -> None:
    def run(x: Tensor, w: Tensor, table: Tensor) -> Tensor:
        return layers(x, w, table, both, keys)

    given = operands(dtype)
    found, got = compiled(run, *given)
    fused = [s for s in found.sites if s.status == "fused"]
    name = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
    assert len(fused) == 2 and all(f"{name}[4, {37 + keys - 1}]" in (s.ir or "") for s in fused)
    assert found.graph_after.count("aten.index.Tensor") == 1  # one lookup for both layers
    exact, own = run(*(t.double() for t in given)), run(*given)
    error, rounding = (own - exact).abs().max(), torch.finfo(dtype).eps * exact.abs().max()
    assert (got - exact).abs().max() <= 2 * error + 4 * rounding


@pytest.mark.parametrize(("both", "fewer"), [(True, 0), (False, 8)])
def test_lengths_may_be_symbols(both: bool, fewer: int) -> None:
    """One graph for all lengths; the table is made from the length of each call, and no tensor of pairs is."""

    def run(x: Tensor, w: Tensor, table: Tensor) -> Tensor:
        return layers(x, w, table, both, x.shape[1] - fewer)

    _, w, table = operands(torch.float32)
    found = Collected()
    token = collecting.set(found)
    torch._dynamo.reset()
    try:
        function = torch.compile(run, backend="attncc", dynamic=True, options=FAST)
        for length in (37, 19, 64):
            given = torch.randn(3, length, 32), w, table
            exact = run(*(t.double() for t in given))
            error, rounding = (run(*given) - exact).abs().max(), torch.finfo(torch.float32).eps * exact.abs().max()
            assert (function(*given) - exact).abs().max() <= 2 * error + 4 * rounding
    finally:
        collecting.reset(token)
    assert [s.status for s in found.sites] == ["fused"] * 2 and len(found.after) == 1
    assert all(re.search(r"f32\[4, -1 \+ .*n1\]", s.ir or "") for s in found.sites), found.sites[0].ir
    assert found.after[0].count("aten.index.Tensor") == 1 and "permute(2, 0, 1)" not in found.after[0]


def test_a_learned_bias_gets_its_gradient() -> None:
    def loss(x: Tensor, w: Tensor, table: Tensor) -> Tensor:
        return layers(x, w, table, True, 37).square().sum()

    torch._dynamo.reset()
    given = operands(torch.float32, gradients=True)
    (want,) = torch.autograd.grad(loss(*given), given[2])
    (got,) = torch.autograd.grad(torch.compile(loss, backend="attncc", options=FAST)(*given), given[2])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_what_depends_on_more_than_the_distance_is_loaded_as_it_is() -> None:
    def near(x: Tensor, w: Tensor, table: Tensor) -> Tensor:
        i, j = torch.arange(37)[:, None], torch.arange(37)[None, :]
        bias = table[bucket(j - i + i // 8, True)].permute(2, 0, 1)[None]
        q, k, v = (t.view(2, 37, 4, 8).transpose(1, 2) for t in (x @ w).chunk(3, -1))
        return (q @ k.transpose(-1, -2) + bias).softmax(-1) @ v

    given = operands(torch.float32)
    found, got = compiled(near, *given)
    assert [s.status for s in found.sites] == ["fused"] and "f32[4, 73]" not in (found.sites[0].ir or "")
    torch.testing.assert_close(got, near(*given))
