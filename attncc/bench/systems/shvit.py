"""Row 23, SHViT (arXiv 2401.16456): one head on part of the channels, channel-major, values times the transpose."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attncc.bench.systems.system import Made, System, drawn, settled


class SingleHead(nn.Module):
    def __init__(self, dim: int, part: int, width: int) -> None:
        super().__init__()
        self.part, self.width = part, width
        self.norm = nn.GroupNorm(1, part)
        self.qkv = nn.Sequential(nn.Conv2d(part, 2 * width + part, 1), nn.BatchNorm2d(2 * width + part))
        self.proj = nn.Sequential(nn.ReLU(), nn.Conv2d(dim, dim, 1), nn.BatchNorm2d(dim))

    def forward(self, x: Tensor) -> Tensor:
        batch, dim, high, wide = x.shape
        head, rest = torch.split(x, [self.part, dim - self.part], dim=1)
        q, k, v = self.qkv(self.norm(head)).split([self.width, self.width, self.part], dim=1)
        q, k, v = q.flatten(2), k.flatten(2), v.flatten(2)
        weights = (q.transpose(-2, -1) @ k * self.width**-0.5).softmax(dim=-1)
        head = (v @ weights.transpose(-2, -1)).reshape(batch, self.part, high, wide)
        return self.proj(torch.cat([head, rest], dim=1))


def _make(full: bool) -> Made:
    dim, part, width, side, batch = (224, 48, 16, 28, 4) if full else (12, 5, 4, 4, 2)
    return settled(SingleHead(dim, part, width), *drawn((batch, dim, side, side)))


SYSTEMS = (System(23, "SHViT", "as published", "exact", _make, 1, trains=True),)
