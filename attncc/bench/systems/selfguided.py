"""Row 31, multi-scale self-guided attention (arXiv 1906.02849): positions with no scale, channels by a Gram matrix."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attncc.bench.systems.system import Made, System, drawn, settled


class Positions(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Conv2d(dim, dim // 8, 1), nn.Conv2d(dim, dim // 8, 1), nn.Conv2d(dim, dim, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x).flatten(2).permute(0, 2, 1), self.k(x).flatten(2), self.v(x).flatten(2)
        weights = torch.bmm(q, k).softmax(-1)
        return self.gamma * torch.bmm(v, weights.permute(0, 2, 1)).view_as(x) + x


class Channels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        energy = torch.bmm(flat, flat.permute(0, 2, 1))
        weights = (energy.amax(-1, keepdim=True).expand_as(energy) - energy).softmax(-1)
        return self.gamma * torch.bmm(weights, flat).view_as(x) + x


class Guided(nn.Module):
    """Both, added."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.positions, self.channels = Positions(dim), Channels()

    def forward(self, x: Tensor) -> Tensor:
        return self.positions(x) + self.channels(x)


def _make(full: bool) -> Made:
    dim, side = (64, 64) if full else (8, 4)
    return settled(Guided(dim), *drawn((1, dim, side, side)))


SYSTEMS = (System(31, "Self-guided attention", "DANet's two", "pattern", _make, 2, trains=True),)
