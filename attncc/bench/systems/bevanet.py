"""Row 39, BEVANet: large depthwise kernels in parts, chosen between by gates, times the input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attncc.bench.systems.system import Made, System, drawn, settled


class LargeKernel(nn.Module):
    """Two branches of strips; means and maxima over channels give a gate for each; u * attention."""

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        half = dim // 2
        self.near = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.far = nn.Sequential(
            nn.Conv2d(dim, dim, (1, size), padding=(0, size // 2), groups=dim),
            nn.Conv2d(dim, dim, (size, 1), padding=(size // 2, 0), groups=dim),
        )
        self.one, self.two, self.out = nn.Conv2d(dim, half, 1), nn.Conv2d(dim, half, 1), nn.Conv2d(half, dim, 1)
        self.choose = nn.Conv2d(2, 2, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        near = self.near(x)
        one, two = self.one(near), self.two(self.far(near))
        both = torch.cat([one, two], 1)
        seen = torch.cat([both.mean(1, keepdim=True), both.amax(1, keepdim=True)], 1)
        shares = torch.sigmoid(self.choose(seen))
        return x * self.out(one * shares[:, :1] + two * shares[:, 1:])


def _make(full: bool) -> Made:
    dim, size, side = (64, 23, 64) if full else (4, 5, 6)
    return settled(LargeKernel(dim, size), *drawn((1, dim, side, side)))


SYSTEMS = (System(39, "BEVANet", "selective kernels", "pattern", _make, trains=True, left=("gate", "modulation")),)
