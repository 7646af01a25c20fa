"""Row 40, FocalNet (arXiv 2203.11926): a gated sum of ever wider depthwise contexts, times the query."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from attncc.bench.systems.system import Made, System, drawn, settled


class Focal(nn.Module):
    def __init__(self, dim: int, levels: int) -> None:
        super().__init__()
        self.levels = levels
        self.f = nn.Conv2d(dim, 2 * dim + levels + 1, 1)
        self.layers = nn.ModuleList(nn.Conv2d(dim, dim, 3 + 2 * n, padding=1 + n, groups=dim) for n in range(levels))
        self.h, self.proj = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        dim = x.shape[1]
        q, context, gates = self.f(x).split([dim, dim, self.levels + 1], 1)
        total = torch.zeros_like(q)
        for level, layer in enumerate(self.layers):
            context = functional.gelu(layer(context))
            total = total + context * gates[:, level : level + 1]
        mean = functional.gelu(context.mean((2, 3), keepdim=True))
        total = total + mean * gates[:, self.levels :]
        return self.proj(q * self.h(total))


def _make(full: bool) -> Made:
    dim, levels, side = (96, 3, 56) if full else (4, 2, 6)
    return settled(Focal(dim, levels), *drawn((1, dim, side, side)))


SYSTEMS = (System(40, "FocalNet", "as published", "pattern", _make, trains=True, left=("modulation",) * 3),)
