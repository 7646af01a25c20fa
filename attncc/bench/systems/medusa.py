"""Row 38, MEDUSA (weakly specified, arXiv 2110.06063): one map, a head a scale, products with features."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from attncc.bench.systems.system import Made, System, drawn, settled


class Medusa(nn.Module):
    """An encoder and decoder of the image give one map; each scale refines it and multiplies its features."""

    def __init__(self, dim: int, scales: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(dim, dim, 3, 2, 1), nn.ConvTranspose2d(dim, 1, 2, 2)
        self.heads = nn.ModuleList(nn.Conv2d(dim + 1, 1, 1) for _ in range(scales))
        self.body = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in range(scales))

    def forward(self, x: Tensor) -> Tensor:
        attention = torch.sigmoid(self.up(torch.relu(self.down(x))))
        for head, body in zip(self.heads, self.body, strict=True):
            x = torch.relu(body(x))
            shared = functional.interpolate(attention, size=x.shape[-2:])
            x = x * torch.sigmoid(head(torch.cat([x, shared], 1)))
        return x


def _make(full: bool) -> Made:
    dim, scales, side = (32, 3, 96) if full else (4, 2, 6)
    return settled(Medusa(dim, scales), *drawn((1, dim, side, side)))


SYSTEMS = (System(38, "MEDUSA", "global map, heads", "pattern", _make, trains=True, left=("gate", "gate")),)
