"""Sizes beyond 2^24, which lanes of 32 bits were not proven for: another kernel is made for them, and the call runs."""

from __future__ import annotations

import pytest
import torch

from attncc.codegen.cpp import emitter
from attncc.codegen.cpp.expressions import fits_32_bits
from attncc.ir import parse_attention, print_attention
from attncc.ir.build import mul
from attncc.kernels.build import built

TEXT = """attention
size   B, N
batch  b = B
axis   i = N, j = 3, d = 1, e = 1
tensor q: f32[B, N, 1]
tensor k: f32[B, 3, 1]
tensor v: f32[B, 3, 1]
q      q[b, i, d]
k      k[b, j, d]
v      v[b, j, e]
score  s
mask   (i + b + j) % 4 != 0
norm   softmax
empty  zero
weight w
give   out
dtype  f32
layout b, i, e
"""
MANY = 2**24 + 5


@pytest.mark.full
@pytest.mark.parametrize(("batch", "rows"), [(1, MANY), (MANY, 1)])
def test_many_queries_or_batches(batch: int, rows: int) -> None:
    compare(print_attention(parse_attention(TEXT)), batch, rows)


@pytest.mark.slow
def test_more_than_a_kernel_was_made_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emitter, "INDEX_BOUND", 64)
    spec = print_attention(parse_attention(TEXT.replace("% 4", "% 5")))
    for batch, rows in ((1, 60), (1, 70), (90, 2)):
        compare(spec, batch, rows, period=5)


def compare(spec: str, batch: int, rows: int, period: int = 4) -> None:
    """The first and the last of a call's rows with what they should be."""
    if built(spec, "cpu").language != "cpp":
        pytest.skip("no C++ compiler")
    g = torch.Generator().manual_seed(0)
    q = torch.randn(batch, rows, 1, generator=g)
    k, v = torch.randn(1, 3, 1, generator=g), torch.randn(1, 3, 1, generator=g)
    (out,) = torch.ops.attncc.attention([q, k.expand(batch, 3, 1), v.expand(batch, 3, 1)], [batch, rows], spec)
    i, b, j = torch.arange(rows)[None, :, None], torch.arange(batch)[:, None, None], torch.arange(3)
    for rows_at, batch_at in ((slice(0, 50), slice(0, 50)), (slice(-50, None), slice(-50, None))):
        hidden = (i[:, rows_at] + b[batch_at] + j) % period == 0
        scores = (q[batch_at, rows_at] @ k.mT).masked_fill(hidden, float("-inf"))
        torch.testing.assert_close(out[batch_at, rows_at], scores.softmax(-1) @ v)


def test_extents_that_are_written_down_are_counted() -> None:
    a = parse_attention(TEXT.replace("size   B, N\n", "").replace("N", str(2**20)).replace("B", "4"))
    assert fits_32_bits(a, mul(a.i.index, a.j.index))
    large = parse_attention(TEXT.replace("size   B, N\n", "").replace("N", str(2**30)).replace("B", "4"))
    assert fits_32_bits(large, large.i.index) and not fits_32_bits(large, mul(large.i.index, large.j.index))
