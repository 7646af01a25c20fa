"""Row 7, BiFormer (arXiv 2303.08810): regions choose regions, and attention is dense inside of the chosen ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attncc.bench.systems.system import Made, System, drawn, settled


class Routed(nn.Module):
    """Tokens channels-last: regions are padded before the projection, whose zeros stay in the softmax (legacy)."""

    def __init__(self, dim: int, heads: int, regions: int, top: int) -> None:
        super().__init__()
        self.heads, self.regions, self.top = heads, regions, top
        self.scale = dim**-0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.lepe = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, high, wide, dim = x.shape
        s = self.regions
        tiles = x.view(batch, s, high // s, s, wide // s, dim).transpose(2, 3).reshape(batch, s * s, -1, dim)
        q, k, v = self.qkv(tiles).chunk(3, -1)
        with torch.no_grad():
            affinity = (q.mean(2) * self.scale) @ k.mean(2).transpose(1, 2)
            chosen = affinity.topk(self.top, dim=-1).indices  # (B, regions, top)
        inside = k.shape[2]
        at = chosen[..., None, None].expand(-1, -1, -1, inside, dim)
        k, v = (
            y[:, None].expand(-1, s * s, -1, -1, -1).gather(2, at).flatten(2, 3)  # (B, regions, top * inside, C)
            for y in (k, v)
        )
        q, keys, values = (
            y.unflatten(-1, (self.heads, -1)).transpose(2, 3) for y in (q, k, v)
        )  # (B, regions, heads, tokens, d)
        out = ((q * self.scale) @ keys.transpose(-2, -1)).softmax(-1) @ values
        out = out.transpose(2, 3).reshape(batch, s, s, high // s, wide // s, dim).transpose(2, 3)
        image = self.qkv(x)[..., 2 * dim :].permute(0, 3, 1, 2)
        return self.proj(out.reshape(batch, high, wide, dim) + self.lepe(image).permute(0, 2, 3, 1))


class RoutedImage(nn.Module):
    """Tokens channels-first, one head after the other, the routing with no scale (current)."""

    def __init__(self, dim: int, heads: int, regions: int, top: int) -> None:
        super().__init__()
        self.heads, self.regions, self.top = heads, regions, top
        self.scale = dim**-0.5
        self.qkv, self.proj = nn.Conv2d(dim, 3 * dim, 1), nn.Conv2d(dim, dim, 1)
        self.lepe = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def to_regions(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, C, H, W) -> (B, heads, regions, tokens, d)"""
        batch, dim = x.shape[:2]
        (a, b), s, m = size, self.regions, self.heads
        return x.view(batch, m, dim // m, s, a, s, b).permute(0, 1, 3, 5, 4, 6, 2).reshape(batch, m, s * s, a * b, -1)

    def forward(self, x: Tensor) -> Tensor:
        batch, dim, high, wide = x.shape
        s, size = self.regions, (high // self.regions, wide // self.regions)
        q, k, v = self.qkv(x).chunk(3, 1)
        q_region = nn.functional.avg_pool2d(q.detach(), size).permute(0, 2, 3, 1).flatten(1, 2)
        k_region = nn.functional.avg_pool2d(k.detach(), size).flatten(2)
        chosen = (q_region @ k_region).topk(self.top, dim=-1).indices[:, None].expand(-1, self.heads, -1, -1)
        query, key, value = (self.to_regions(y, size) for y in (q, k, v))
        many, inside, width = s * s, key.shape[3], key.shape[4]
        at = chosen[..., None, None].expand(-1, -1, -1, -1, inside, width)
        key, value = (
            y[:, :, None].expand(-1, -1, many, -1, -1, -1).gather(3, at).flatten(3, 4) for y in (key, value)
        )
        weights = torch.softmax((query * self.scale) @ key.transpose(-2, -1), dim=-1)
        out = (weights @ value).view(batch, self.heads, s, s, *size, width)
        out = out.permute(0, 1, 6, 2, 4, 3, 5).reshape(batch, dim, high, wide)
        return self.proj(out + self.lepe(v))


def _make(full: bool, kind: type[Routed] | type[RoutedImage]) -> Made:
    dim, heads, regions, top, side = (128, 4, 7, 4, 56) if full else (8, 2, 3, 2, 6)
    shape = (1, side, side, dim) if kind is Routed else (1, dim, side, side)
    return settled(kind(dim, heads, regions, top), *drawn(shape))


SYSTEMS = (
    System(7, "BiFormer", "legacy, channels last", "trained", lambda full: _make(full, Routed), 1, trains=True,
           gap="the gathered keys and values are still made: no indirect blocks yet"),
    System(7, "BiFormer", "current, channels first", "trained", lambda full: _make(full, RoutedImage), 1, trains=True),
)
