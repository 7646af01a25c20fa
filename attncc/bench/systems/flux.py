"""Row 18, Flux Attention: a router sends a layer to full attention or to a stream with sinks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from attncc.bench.systems.system import Made, System, drawn, heads_of, joined, settled


class Rerouted(nn.Module):
    """The router reads the mean of the first and the last queries over tokens and heads; it takes one layer for all."""

    def __init__(self, dim: int, heads: int, ends: int, sinks: int, window: int, *, branches: bool) -> None:
        super().__init__()
        self.heads, self.ends, self.sinks, self.window, self.branches = heads, ends, sinks, window, branches
        width = dim // heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.route = nn.Sequential(
            nn.Linear(2 * width, 8 * width), nn.SiLU(), nn.Linear(8 * width, 2 * width), nn.SiLU(),
            nn.Linear(2 * width, 2),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads_of(y, self.heads) for y in self.qkv(x).chunk(3, -1))
        ends = torch.cat([q[:, :, : self.ends].mean(2), q[:, :, -self.ends :].mean(2)], -1).mean(1)
        logits = self.route(ends)
        if self.branches:
            full = logits[0, 1] > logits[0, 0]
            return self.out(torch.cond(full, self.whole, self.streamed, (q, k, v)))
        full = (logits.argmax(-1) == 1)[:, None, None, None]
        i, j = torch.arange(x.shape[1])[:, None], torch.arange(x.shape[1])
        seen = (j <= i) & (full | (i - j < self.window) | (j < self.sinks))
        return self.out(joined(scaled_dot_product_attention(q, k, v, attn_mask=seen)))

    def whole(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return joined(scaled_dot_product_attention(q, k, v, is_causal=True)).clone()

    def streamed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])
        seen = (j <= i) & ((i - j < self.window) | (j < self.sinks))
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, float("-inf"))
        return joined(scores.softmax(-1) @ v).clone()


def _make(full: bool, branches: bool) -> Made:
    n, dim, heads, ends, sinks, window = (4096, 512, 8, 100, 128, 1024) if full else (36, 16, 2, 4, 2, 6)
    return settled(Rerouted(dim, heads, ends, sinks, window, branches=branches), *drawn((1, n, dim)))


_CLAIM = "2.8x prefill, 2.0x decode"
SYSTEMS = (
    System(18, "Flux Attention", "route in the mask", "trained", lambda full: _make(full, False), 1, claim=_CLAIM),
    System(18, "Flux Attention", "torch.cond", "trained", lambda full: _make(full, True), 2, claim=_CLAIM),
)
