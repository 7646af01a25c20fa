"""Row 45, FFNet (arXiv 2206.08236): convolutions, nothing to compile."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from attncc.bench.systems.system import Made, System, drawn, settled


class Plain(nn.Module):
    """A stem of residual blocks and a head that joins two scales."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, dim, 3, 2, 1), nn.BatchNorm2d(dim), nn.ReLU())
        self.block = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1), nn.BatchNorm2d(dim), nn.ReLU(),
            nn.Conv2d(dim, dim, 3, padding=1), nn.BatchNorm2d(dim),
        )  # fmt: skip
        self.down, self.head = nn.Conv2d(dim, 2 * dim, 3, 2, 1), nn.Conv2d(3 * dim, classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        x = functional.relu(x + self.block(x))
        deep = functional.relu(self.down(x))
        up = functional.interpolate(deep, size=x.shape[-2:], mode="bilinear", align_corners=False)
        return self.head(torch.cat([x, up], 1))


def _make(full: bool) -> Made:
    dim, side = (64, 160) if full else (4, 12)
    return settled(Plain(dim, 5), *drawn((1, 3, side, side)))


SYSTEMS = (System(45, "FFNet", "convolutions", "none", _make, trains=True),)
