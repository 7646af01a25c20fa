"""Row 30, DLGSANet (arXiv 2301.02031): channels weighed by relu, and filters made from the image."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from attncc.bench.systems.system import Made, System, drawn, settled


class SparseGlobal(nn.Module):
    """relu(norm(q) norm(k)^T * t) v over channels."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = nn.Sequential(nn.Conv2d(dim, 3 * dim, 1), nn.Conv2d(3 * dim, 3 * dim, 3, padding=1, groups=3 * dim))
        self.out = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(1, (self.heads, -1)).flatten(3) for y in self.qkv(x).chunk(3, 1))
        q, k = functional.normalize(q, dim=-1), functional.normalize(k, dim=-1)
        out = torch.relu(q @ k.transpose(-2, -1) * self.temperature) @ v
        return self.out(out.reshape_as(x))


class DynamicFilters(nn.Module):
    """A filter of each channel, made from the means of the image by two layers."""

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.make = nn.Sequential(nn.Conv2d(dim, dim // 2, 1), nn.GELU(), nn.Conv2d(dim // 2, dim * size * size, 1))

    def forward(self, x: Tensor) -> Tensor:
        batch, dim, high, wide = x.shape
        filters = self.make(functional.adaptive_avg_pool2d(x, 1)).view(batch * dim, 1, self.size, self.size)
        out = functional.conv2d(x.view(1, -1, high, wide), filters, padding=self.size // 2, groups=batch * dim)
        return out.view_as(x)


def _attention(full: bool) -> Made:
    dim, heads, side = (96, 4, 96) if full else (8, 2, 5)
    return settled(SparseGlobal(dim, heads), *drawn((1, dim, side, side)))


def _filters(full: bool) -> Made:
    dim, size, side, batch = (96, 7, 64, 2) if full else (8, 3, 5, 2)
    return settled(DynamicFilters(dim, size), *drawn((batch, dim, side, side)))


SYSTEMS = (
    System(30, "DLGSANet", "sparse global attention", "pattern", _attention, 1, trains=True),
    System(30, "DLGSANet", "dynamic filters", "pattern", _filters, left=("dynamic-filters",), trains=True),
)
