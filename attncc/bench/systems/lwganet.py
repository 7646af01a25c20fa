"""Row 41, LWGANet (arXiv 2501.10040): groups of channels, each its own: a gate, a convolution, strips, heads of 4."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attncc.bench.systems.system import Made, System, drawn, settled


class Grouped(nn.Module):
    def __init__(self, dim: int, strip: int) -> None:
        super().__init__()
        part = dim // 4
        self.gate, self.local = nn.Conv2d(part, part, 1), nn.Conv2d(part, part, 3, padding=1, groups=part)
        self.strip = nn.Conv2d(part, part, (strip, 1), padding=(strip // 2, 0), groups=part)
        self.qkv, self.out = nn.Conv2d(part, 3 * part, 1), nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        one, two, three, four = x.chunk(4, 1)
        one = one * torch.sigmoid(self.gate(one))
        two = self.local(two)
        three = three * torch.sigmoid(self.strip(three))
        batch, part, high, wide = four.shape
        q, k, v = self.qkv(four).view(batch, 3, part // 4, 4, -1).unbind(1)  # heads of 4 components
        weights = (q.transpose(-2, -1) @ k * 0.5).softmax(-1)
        four = (v @ weights.transpose(-2, -1)).reshape(batch, part, high, wide)
        return self.out(torch.cat([one, two, three, four], 1))


def _make(full: bool) -> Made:
    dim, strip, side = (128, 11, 32) if full else (16, 3, 4)
    return settled(Grouped(dim, strip), *drawn((1, dim, side, side)))


SYSTEMS = (System(41, "LWGANet", "four groups", "pattern", _make, 1, trains=True, left=("gate", "gate")),)
