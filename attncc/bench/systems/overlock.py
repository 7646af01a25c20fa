"""Row 42, OverLoCK (arXiv 2502.20087): filters of each place from queries and pooled keys; squeeze-and-excite."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from attncc.bench.systems.system import Made, System, drawn, settled


class ContextMixing(nn.Module):
    """The weights of a k x k neighbourhood are a softmax over the elements of a product with pooled keys."""

    def __init__(self, dim: int, heads: int, size: int, pooled: int) -> None:
        super().__init__()
        self.heads, self.size, self.pooled = heads, size, pooled
        self.q, self.k, self.v = (nn.Conv2d(dim, dim, 1) for _ in range(3))
        self.make = nn.Conv1d(pooled * pooled, size * size, 1)
        self.squeeze, self.excite = nn.Conv2d(dim, dim // 2, 1), nn.Conv2d(dim // 2, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, dim = x.shape[:2]
        h, k = self.heads, self.size
        q = self.q(x).view(batch * h, dim // h, -1)
        key = functional.adaptive_avg_pool2d(self.k(x), self.pooled).view(batch * h, dim // h, -1)
        affinity = key.transpose(1, 2) @ q * (dim // h) ** -0.5  # (B h, pooled^2, N)
        weights = self.make(affinity).softmax(1).view(batch, h, 1, k * k, -1)
        near = functional.unfold(self.v(x), k, padding=k // 2).view(batch, h, dim // h, k * k, -1)
        out = (near * weights).sum(3).reshape_as(x)
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(out.mean((2, 3), keepdim=True)))))
        return out * gate


def _make(full: bool) -> Made:
    dim, heads, size, pooled, side = (64, 4, 7, 7, 56) if full else (4, 2, 3, 2, 6)
    return settled(ContextMixing(dim, heads, size, pooled), *drawn((1, dim, side, side)))


SYSTEMS = (
    System(42, "OverLoCK", "unfolded neighbourhood", "pattern", _make, 1, trains=True, left=("squeeze-excite",),
           gap="the unfolded neighbourhood is still made"),
)
