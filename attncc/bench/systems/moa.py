"""Row 6, MoA (arXiv 2406.14909): each head has a span that grows with the length, and a first block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attncc.bench.systems import dense
from attncc.bench.systems.system import Made, System, drawn, heads_of, joined, settled


class Spans(nn.Module):
    """The masked form of what was chosen: at most two rules a layer."""

    def __init__(self, dim: int, heads: int, block: int, alpha: list[float], beta: list[float]) -> None:
        super().__init__()
        self.heads, self.block = heads, block
        self.alpha, self.beta = alpha, beta
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, b = x.shape[1], self.block
        q, k, v = (heads_of(y, self.heads) for y in self.qkv(x).chunk(3, -1))
        i, j = torch.arange(n)[:, None], torch.arange(n)
        spans = torch.tensor([max(1, int(p // b + m * n / b)) for p, m in zip(self.alpha, self.beta, strict=True)])
        near = (i // b - j // b) < spans[:, None, None]
        scores = (q @ k.mT) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(~((j <= i) & (near | (j < b))), torch.finfo(scores.dtype).min)
        return self.out(joined(scores.softmax(-1) @ v))


def _make(full: bool) -> Made:
    n, dim, heads, block = (4096, 512, 8, 64) if full else (40, 16, 4, 4)
    alpha, beta = [0.0, float(4 * block)] * (heads // 2), [0.25, 0.0] * (heads // 2)
    return settled(Spans(dim, heads, block, alpha, beta), *drawn((1, n, dim)))


_CLAIM = "decode 6.6-8.2x FlashAttention-2, memory 1.2-1.4x lower"
SYSTEMS = (
    System(6, "MoA", "plan", "policy", lambda full: dense.make(full, causal=True), 1,
           form="spans{alpha=0,beta=0.25,block=64}", claim=_CLAIM,
           gap="a prefill on a CPU, where they decode in batches; spans are given, no solver is run"),
    System(6, "MoA", "chosen spans, written out", "exact", _make, 1, claim=_CLAIM),
)  # fmt: skip
