"""Rows that an additive mask hides whole: every score is the type's lowest value, and the answer is the mean of V."""

from __future__ import annotations

import pytest
import torch

from attncc.ir import interpret, parse_attention, print_attention
from attncc.kernels.build import built

TEXT = """attention
batch  b0 = 2, b1 = 2, b2 = 4
axis   i = 11, j = 22, d = 8, e = 8
tensor q: f32[2, 8, 11, 8]
tensor k: f32[2, 2, 22, 8]
tensor v: f32[2, 2, 22, 8]
tensor t0: f32[2, 1, 11, 22]
q      q[b0, b1 * 4 + b2, i, d]
k      k[b0, b1, j, d]
v      v[b0, b1, j, e]
score  s * 0.25 + t0[b0, 0, i, j]
mask   True
norm   softmax
empty  zero
weight w
give   out
dtype  f32
layout b0, i, b1, b2, e
"""


@pytest.mark.parametrize("fill", [-1e30, -3e38, torch.finfo(torch.float32).min])
def test_a_row_of_lowest_scores_is_the_mean(fill: float) -> None:
    a = parse_attention(TEXT)
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 8, 11, 8), torch.randn(2, 2, 22, 8), torch.randn(2, 2, 22, 8)
    i, j = torch.arange(11)[:, None], torch.arange(22)[None]
    bias = torch.zeros(2, 1, 11, 22).masked_fill_(j > i, fill)
    bias[0, :, :, :3] = fill
    tensors = {"q": q, "k": k, "v": v, "t0": bias}
    exact = interpret(a, tensors, compute=torch.float64)["out"]
    plain = interpret(a, tensors)["out"]
    out = torch.empty_like(plain)
    built(print_attention(a), "cpu").kernel([q, k, v, bias], [], [out])
    assert (out - exact).abs().max() <= 4 * (plain - exact).abs().max() + 1e-6
    mean = v[0].double().mean(1)[:, None].expand(2, 4, 8)
    torch.testing.assert_close(out[0, :, :, 0].double(), mean, rtol=1e-5, atol=1e-6)
