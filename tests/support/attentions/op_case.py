"""One attention for the tests of the operator: its text, data, the kernel that stands in for it, and the oracle."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attncc.codegen.torch_form import run_blocked
from attncc.ir import Attention, interpret, parse_attention, print_attention
from attncc.runtime import op

SPEC = """attention
size   B, N, M
batch  b = B, h = 4
axis   i = N, j = M, d = 8, e = 6
tensor q: {dtype}[B, N, 32]
tensor k: {dtype}[B, 4, M, 8]
tensor v: {dtype}[B, 4, M, 6]
tensor bias: f32[4, N, M]
tensor length: i64[B]
q      q[b, i, h * 8 + d]
k      k[b, h, j, d]
v      v[b, h, j, e]
score  s * 0.25 + bias[h, i, j]
mask   j < length[b]
norm   softmax
empty  zero
weight w
give   {give}
dtype  {dtype}
layout b, i, h, e
"""


def spec(dtype: str = "f32", give: str = "out") -> str:
    return print_attention(parse_attention(SPEC.format(dtype=dtype, give=give)))


PLAIN = spec()


def inputs(b: int = 2, n: int = 5, m: int = 7, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(b + n + m)
    q, k, v, bias = (
        torch.randn(s, generator=random).to(dtype) for s in ((b, n, 32), (b, 4, m, 8), (b, 4, m, 6), (4, n, m))
    )
    return [q, k, v, bias.float(), torch.arange(1, b + 1)]


def build(a: Attention, text: str, device: torch.device) -> op.Kernel:
    def kernel(tensors: Sequence[torch.Tensor], sizes: Sequence[int], outputs: Sequence[torch.Tensor]) -> None:
        for out, value in zip(outputs, run_blocked(a, tensors, sizes), strict=True):
            out.copy_(value)

    return kernel


def attend(tensors: Sequence[torch.Tensor], text: str = PLAIN) -> list[torch.Tensor]:
    q, k = tensors[:2]
    sizes = [q.shape[0], q.shape[1], k.shape[2]]
    return torch.ops.attncc.attention(list(tensors), sizes, text)


def reference(tensors: Sequence[torch.Tensor], text: str = PLAIN) -> list[torch.Tensor]:
    a = parse_attention(text)
    q, k = tensors[:2]
    named = {t.name: x for t, x in zip(a.tensors, tensors, strict=True)}
    return list(interpret(a, named, [q.shape[0], q.shape[1], k.shape[2]]).values())
