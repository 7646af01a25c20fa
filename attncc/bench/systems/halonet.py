"""Row 4, HaloNet (arXiv 2103.12731): blocks of queries, their block of keys with a halo, relative logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from attncc.bench.systems.system import Made, System, drawn, settled


class Halo(nn.Module):
    """The halo at the edges is of zeros, which stay in the softmax."""

    def __init__(self, block: int, halo: int, dim: int, heads: int, *, strided: bool) -> None:
        super().__init__()
        self.block, self.halo, self.heads, self.strided = block, halo, heads, strided
        self.size = block + 2 * halo
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, bias=False)
        width = dim // heads
        self.rows = nn.Parameter(torch.zeros(self.size + block - 1, width))
        self.columns = nn.Parameter(torch.zeros(self.size + block - 1, width))

    def relative(self, q: Tensor, table: Tensor) -> Tensor:
        """(..., x, y, d) -> (..., x, y, key along y), by the skew of Transformer-XL"""
        logits = q @ table.transpose(0, 1)
        block, many = q.shape[-2], table.shape[0]
        padded = functional.pad(functional.pad(logits, (0, 1)).flatten(-2), (0, many - block))
        return padded.unflatten(-1, (block + 1, many))[..., :block, block - 1 : block - 1 + self.size]

    def windows(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, blocks, size * size, C)"""
        if not self.strided:
            found = functional.unfold(x, self.size, stride=self.block, padding=self.halo)
            return found.unflatten(1, (x.shape[1], -1)).permute(0, 3, 2, 1)
        padded = functional.pad(x, (self.halo,) * 4)
        tiles = padded.unfold(2, self.size, self.block).unfold(3, self.size, self.block)
        return tiles.permute(0, 2, 3, 4, 5, 1).flatten(3, 4).flatten(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        batch, dim, high, wide = x.shape
        b, heads, width = self.block, self.heads, dim // self.heads
        q, k, v = self.qkv(x).chunk(3, 1)
        q = q.view(batch, dim, high // b, b, wide // b, b).permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, b * b, dim)
        q, k, v = (y.unflatten(-1, (heads, width)).transpose(2, 3) for y in (q, self.windows(k), self.windows(v)))
        scores = (q * width**-0.5) @ k.transpose(-1, -2)
        grid = q.unflatten(3, (b, b))
        across = self.relative(grid, self.columns)[..., :, :, None, :]
        down = self.relative(grid.transpose(-3, -2), self.rows).transpose(-3, -2)[..., None]
        scores = scores + (across + down).flatten(-2).flatten(3, 4)
        out = scores.softmax(-1) @ v
        out = out.transpose(2, 3).reshape(batch, high // b, wide // b, b, b, dim)
        return out.permute(0, 5, 1, 3, 2, 4).reshape(batch, dim, high, wide)


def _make(full: bool, strided: bool) -> Made:
    block, halo, dim, heads, side = (8, 3, 128, 4, 64) if full else (2, 1, 8, 2, 6)
    return settled(Halo(block, halo, dim, heads, strided=strided), *drawn((1, dim, side, side)))


SYSTEMS = (
    System(4, "HaloNet", "unfold", "exact", lambda full: _make(full, False), 1, trains=True),
    System(4, "HaloNet", "Tensor.unfold", "exact", lambda full: _make(full, True), 1, trains=True),
)
