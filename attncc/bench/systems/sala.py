"""Row 19, MiniCPM-SALA: layers that select blocks for each token, layers of linear attention, and gates."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from attncc.bench.systems.system import Made, System, drawn, heads_of, joined, settled


class Selected(nn.Module):
    """InfLLM-V2: overlapping means of keys score blocks of keys, the first and near ones are always taken."""

    def __init__(self, dim: int, heads: int, groups: int, stride: int, top: int, near: int) -> None:
        super().__init__()
        self.heads, self.groups, self.stride, self.top, self.near = heads, groups, stride, top, near
        width = dim // heads
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * groups * width)
        self.gate, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)

    @torch.no_grad()
    def seen(self, q: Tensor, k: Tensor) -> Tensor:
        n, s, width = q.shape[2], self.stride, q.shape[-1]
        means = k.unfold(2, 2 * s, s).mean(-1)  # of two strides
        many, token = means.shape[2], torch.arange(n)
        known = torch.arange(many) < ((token - s + 1) // s).clamp(min=0)[:, None]
        grouped = q.unflatten(1, (self.groups, -1))
        scores = (grouped @ means[:, :, None].mT * width**-0.5).masked_fill(~known, float("-inf"))
        mass = scores.softmax(-1).nan_to_num(0.0).sum(2)  # over the heads of a group
        blocks = -(-n // (4 * s))
        pooled = functional.max_pool1d(mass.flatten(0, 1), 5, 4, 1, ceil_mode=True)
        pooled = functional.pad(pooled, (0, max(0, blocks - pooled.shape[-1])))[..., :blocks]
        pooled = pooled.unflatten(0, mass.shape[:2])
        own, block = token[:, None] // (4 * s), torch.arange(blocks)
        forced = (block == 0) | ((own - block < self.near) & (block <= own))
        pooled = pooled.masked_fill(forced, float("inf")).masked_fill(block > own, float("-inf"))
        best = pooled.topk(min(self.top, blocks), -1).indices
        taken = torch.zeros_like(pooled, dtype=torch.bool).scatter(-1, best, True)
        return taken.repeat_interleave(4 * s, -1)[..., :n] & (torch.arange(n) <= token[:, None])

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.kv(x).chunk(2, -1)
        q, k, v = heads_of(self.q(x), self.heads), heads_of(k, self.groups), heads_of(v, self.groups)
        share = self.heads // self.groups
        seen = self.seen(q, k).repeat_interleave(share, 1)
        k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, float("-inf"))
        return self.out(joined(scores.softmax(-1) @ v) * self.gate(x).sigmoid())


class Lightning(nn.Module):
    """Linear attention whose state decays by a constant of the head, written over all pairs under a causal decay."""

    slopes: Tensor

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.gate, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.register_buffer("slopes", 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads))
        self.norm = nn.RMSNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads_of(y, self.heads) for y in self.qkv(x).chunk(3, -1))
        n = x.shape[1]
        apart = torch.arange(n)[:, None] - torch.arange(n)
        decay = torch.exp(-self.slopes[:, None, None] * apart).masked_fill(apart < 0, 0.0)
        out = ((q @ k.mT) * decay) @ v * q.shape[-1] ** -0.5
        return self.out(self.norm(joined(out)) * self.gate(x).sigmoid())


class Hybrid(nn.Module):
    """One layer of each kind."""

    def __init__(self, dim: int, heads: int, groups: int, stride: int, top: int, near: int) -> None:
        super().__init__()
        self.sparse, self.linear = Selected(dim, heads, groups, stride, top, near), Lightning(dim, heads)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.sparse(x)
        return x + self.linear(x)


def _sparse(full: bool) -> Made:
    n, dim, heads, groups, stride, top, near = (4096, 512, 16, 1, 16, 24, 9) if full else (50, 16, 4, 2, 2, 3, 2)
    return settled(Selected(dim, heads, groups, stride, top, near), *drawn((1, n, dim)))


def _hybrid(full: bool) -> Made:
    n, dim, heads, groups, stride, top, near = (2048, 256, 8, 1, 16, 12, 5) if full else (50, 16, 4, 2, 2, 3, 2)
    return settled(Hybrid(dim, heads, groups, stride, top, near), *drawn((1, n, dim)))


_CLAIM = "3.5x Qwen3-8B at 256K tokens on an A6000D"
SYSTEMS = (
    System(19, "MiniCPM-SALA", "sparse layer", "trained", _sparse, 1, left=("goes-to-heads",), claim=_CLAIM,
           gap="4096 tokens, where they are dense under 8192"),
    System(19, "MiniCPM-SALA", "sparse and lightning layers", "trained", _hybrid, 2, left=("goes-to-heads",),
           claim=_CLAIM),
)  # fmt: skip
