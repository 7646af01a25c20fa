"""Row 24, unified feature and cost aggregation (arXiv 2403.11120): the correlation is attended with, and refined."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attncc.bench.systems.system import Made, System, drawn, heads_of, joined, settled


class Aggregation(nn.Module):
    """One softmax over features and cost weights the features, and the cost; the scores are a result too."""

    def __init__(self, dim: int, heads: int, cost: int) -> None:
        super().__init__()
        self.heads = heads
        self.qk = nn.Linear(dim + cost, 2 * dim)
        self.feature, self.costs, self.out = nn.Linear(dim, dim), nn.Linear(cost, dim), nn.Linear(dim, dim)
        self.refined = nn.Linear(dim, cost)

    def forward(self, x: Tensor, cost: Tensor) -> tuple[Tensor, Tensor]:
        q, k = (heads_of(y, self.heads) for y in self.qk(torch.cat([x, cost], -1)).chunk(2, -1))
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        features = weights @ heads_of(self.feature(x), self.heads)
        costs = weights @ heads_of(self.costs(cost), self.heads)
        return x + self.out(joined(features)), cost + self.refined(joined(costs))


class Scored(nn.Module):
    """Cross attention of two images whose scores are the cost that comes out."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (heads_of(y, self.heads) for y in self.kv(target).chunk(2, -1))
        cost = heads_of(self.q(source), self.heads) @ k.mT * k.shape[-1] ** -0.5
        return source + self.out(joined(cost.softmax(-1) @ v)), cost.mean(1)


def _make(full: bool) -> Made:
    n, dim, heads, cost = (1024, 256, 4, 256) if full else (20, 8, 2, 6)
    return settled(Aggregation(dim, heads, cost), *drawn((1, n, dim), (1, n, cost)))


def _scored(full: bool) -> Made:
    n, dim, heads = (1024, 256, 4) if full else (20, 8, 2)
    return settled(Scored(dim, heads), *drawn((1, n, dim), (1, n, dim)))


SYSTEMS = (
    System(24, "Cost aggregation", "one softmax, two values", "exact", _make, 2, trains=True),
    System(24, "Cost aggregation", "scores come out", "exact", _scored, 1, trains=True,
           gap="the scores must exist, so that nothing is gained by not storing the weights"),
)  # fmt: skip
