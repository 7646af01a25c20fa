"""Row 2, Dilated Neighborhood Attention (arXiv 2209.15001): row 1 with tokens a dilation apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attncc.bench.systems.gna import Neighbourhood, flex, visible
from attncc.bench.systems.system import Made, System, drawn, settled


class Gathered(nn.Module):
    """Each token's neighbours in one dimension, fetched by a table of their numbers, as without a kernel."""

    near: Tensor

    def __init__(self, length: int, window: int, dilation: int, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        token = torch.arange(length)
        seen = visible(token[:, None], token, length, window, 1, dilation, False)
        self.register_buffer("near", seen.nonzero()[:, 1].view(length, window))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        k, v = k[:, :, self.near], v[:, :, self.near]  # (B, heads, N, window, d)
        weights = torch.einsum("bhnd,bhnwd->bhnw", q * q.shape[-1] ** -0.5, k).softmax(-1)
        return self.proj(torch.einsum("bhnw,bhnwd->bhnd", weights, v).transpose(1, 2).flatten(2))


def _masked(full: bool) -> Made:
    grid, window, dim, heads = ((56, 56), (7, 7), 128, 4) if full else ((8, 9), (3, 3), 8, 2)
    model = Neighbourhood(grid, window, (1, 1), (4, 4) if full else (2, 3), (False, False), dim, heads, eager=True)
    return settled(model, *drawn((1, grid[0] * grid[1], dim)))


def _gathered(full: bool) -> Made:
    length, window, dilation, dim, heads = (4096, 13, 4, 128, 4) if full else (24, 3, 2, 8, 2)
    return settled(Gathered(length, window, dilation, dim, heads), *drawn((1, length, dim)))


SYSTEMS = (
    System(2, "DiNAT", "masked softmax", "exact", _masked, 1, flex=flex),
    System(2, "DiNAT", "gathered neighbours", "exact", _gathered, 1),
)
