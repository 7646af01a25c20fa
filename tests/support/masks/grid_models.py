"""Modules with attention over a grid of tokens, masked by coordinates as models write it: a dense mask, made in
the graph."""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Grid(nn.Module):
    """Attention over `grid`, under the mask that `sees` gives for the coordinates of queries and keys."""

    def __init__(self, grid: tuple[int, ...], heads: int = 1, size: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.grid, self.heads, self.size = grid, heads, size
        self.qkv = nn.Linear(heads * size, 3 * heads * size)

    def coordinates(self) -> list[Tensor]:
        tokens = torch.arange(prod(self.grid))
        found: list[Tensor] = []
        for n, extent in enumerate(self.grid):
            found.append(tokens // prod(self.grid[n + 1 :]) % extent)
        return found

    def sees(self, dim: int, query: Tensor, key: Tensor) -> Tensor:
        raise NotImplementedError

    def mask(self) -> Tensor:
        terms = [self.sees(n, x[:, None], x[None, :]) for n, x in enumerate(self.coordinates())]
        whole = terms[0]
        for term in terms[1:]:
            whole = whole & term
        return whole

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask())
        return out.transpose(1, 2).reshape(b, n, c)

    def example(self) -> Tensor:
        tokens = prod(self.grid)
        return torch.randn(1, tokens, self.heads * self.size, generator=torch.Generator().manual_seed(1))


class Neighbourhood(Grid):
    """As NATTEN defines it: `window` neighbours a dimension, shifted inward at the edges, dilated and strided."""

    def __init__(
        self, grid: tuple[int, ...], window: tuple[int, ...], stride: int = 1, dilation: int = 1, causal: int = 0
    ) -> None:
        super().__init__(grid)
        self.window, self.stride, self.dilation, self.causal = window, stride, dilation, causal

    def sees(self, dim: int, query: Tensor, key: Tensor) -> Tensor:
        d, s, k = self.dilation, self.stride, self.window[dim]
        length, i, j = self.grid[dim] // d, query // d, key // d
        if dim < self.causal:
            centre = torch.clamp(i // s * s + s - 1, max=length - 1)
            inside = (j >= torch.clamp(centre - k + 1, min=0)) & (j <= i)
        else:
            left, right = k // 2, k - 1 - k // 2
            centre = torch.clamp(i // s * s + s // 2, max=length - 1)
            past = torch.where(centre + right >= length, length - 1 - right - centre, 0)
            start = torch.clamp(centre - left, min=0) + past
            inside = (j >= start) & (j < start + k)
        return inside if d == 1 else inside & (query % d == key % d)


class Meshed(Neighbourhood):
    """Coordinates from meshgrid, and a softmax spelled out."""

    def coordinates(self) -> list[Tensor]:
        found = torch.meshgrid(*(torch.arange(n) for n in self.grid), indexing="ij")
        return [x.flatten() for x in found]

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2) * self.size**-0.5).masked_fill(~self.mask(), float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c)


class Halo(Grid):
    """HaloNet: a query sees its block of `block` tokens a dimension and `halo` more around it."""

    def __init__(self, grid: tuple[int, ...], block: int, halo: int) -> None:
        super().__init__(grid)
        self.block, self.halo = block, halo

    def sees(self, dim: int, query: Tensor, key: Tensor) -> Tensor:
        first = query // self.block * self.block
        return (key >= first - self.halo) & (key < first + self.block + self.halo)


class Windows(Grid):
    """Swin's windows as a mask."""

    def __init__(self, grid: tuple[int, ...], side: int) -> None:
        super().__init__(grid)
        self.side = side

    def sees(self, dim: int, query: Tensor, key: Tensor) -> Tensor:
        return query // self.side == key // self.side


class Ball(Grid):
    """Within a distance: a term over both dimensions."""

    def mask(self) -> Tensor:
        y, x = self.coordinates()
        far = (y[:, None] - y[None, :]) ** 2 + (x[:, None] - x[None, :]) ** 2
        return far <= 25


class Padded(Neighbourhood):
    """With tokens that no query may see, and rows that see none."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        given = x[:, :, 0] < 1.5
        mask = self.mask() & given[:, None, None, :] & given[:, None, :, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(1, 2).reshape(b, n, c)
