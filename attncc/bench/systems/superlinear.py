"""Row 9, Superlinear attention: a search picks spans, a softmax for each with the window, mixed by the search."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from attncc.bench.systems.system import Made, System, drawn, heads_of, joined, settled


class Searched(nn.Module):
    """Two queries: one searches anchors q - floor(i^(1/p)) + 1 before the window, the other attends."""

    def __init__(
        self, dim: int, heads: int, groups: int, window: int, spans: int, backward: float, forward: float, power: float,
        *, stacked: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.groups, self.spans, self.power = heads, groups, spans, power
        self.first = math.ceil((window + 1) ** power)  # of the stripes beyond the window
        self.window = math.floor((self.first + 1) ** (1 / power)) - 1
        self.back, self.on, self.stacked = backward, forward, stacked
        width = dim // heads
        self.search, self.q = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.kv, self.out = nn.Linear(dim, 2 * groups * width), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        k, v = self.kv(x).chunk(2, -1)
        search, q = heads_of(self.search(x), self.heads), heads_of(self.q(x), self.heads)
        share = self.heads // self.groups
        k, v = (heads_of(y, self.groups).repeat_interleave(share, 1) for y in (k, v))
        i, j = torch.arange(n)[:, None], torch.arange(n)
        stripe = torch.arange(self.first + 1, math.floor(n**self.power) + 2)
        anchor = i - stripe.to(torch.float64).pow(1 / self.power).floor().long() + 1  # (N, stripes)
        found = torch.einsum("bhid,bhjd->bhij", search, k).gather(
            -1, anchor.clamp(min=0).expand(*q.shape[:2], -1, -1)
        )
        best = found.masked_fill(anchor < 0, float("-inf")).topk(self.spans, -1)
        at = anchor.expand_as(found).gather(-1, best.indices)  # (B, heads, N, spans)
        mix = best.values.softmax(-1).nan_to_num(0.0)
        reach = (i + 1.0).pow(self.power)
        start = i - self.window + 1
        low = (at - (self.back * reach).ceil().long()).clamp(min=0)
        high = (at + (self.on * reach).ceil().long()).minimum(start - 1)
        near = (j >= start) & (j <= i)
        scores = q @ k.mT * q.shape[-1] ** -0.5
        none = (at < 0).all(-1, keepdim=True)  # no anchor that early: the window alone
        mix = torch.where(none, 1 / self.spans, mix)
        if self.stacked:
            inside = (j >= low[..., None]) & (j <= high[..., None]) & (at >= 0)[..., None]
            weights = scores[:, :, :, None].masked_fill(~(inside | near[:, None]), float("-inf")).softmax(-1)
            return self.out(joined((weights * mix[..., None]).sum(3) @ v))
        out = torch.zeros_like(q)
        for span in range(self.spans):
            inside = (j >= low[..., span, None]) & (j <= high[..., span, None]) & (at[..., span, None] >= 0)
            weights = scores.masked_fill(~(inside | near), float("-inf")).softmax(-1)
            out = out + mix[..., span, None] * (weights @ v)
        return self.out(joined(out))


def _make(full: bool, stacked: bool) -> Made:
    n, dim, heads, groups, window, spans = (2048, 256, 4, 2, 256, 3) if full else (40, 16, 2, 1, 5, 2)
    model = Searched(dim, heads, groups, window, spans, 3.0, 1.0, 0.55, stacked=stacked)
    return settled(model, *drawn((1, n, dim)))


_CLAIM = "114/80 tokens/s at 1M/10M tokens on a B200, 30B hybrid"
SYSTEMS = (
    System(9, "Superlinear", "a softmax a span", "trained", lambda full: _make(full, False), 2, trains=True,
           claim=_CLAIM, left=("gates",), gap="2048 tokens; theirs is for lengths at which the window is a small part"),
    System(9, "Superlinear", "stacked spans", "trained", lambda full: _make(full, True), 1, trains=True, claim=_CLAIM,
           left=("weights-whole-tensors/scores-chosen",)),
)
