"""A model around one piece of code, for the tests of what is no attention and why."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from reading.lifting import Q

B, H, N, D = 2, 4, 21, 8
WIDTH = H * D


class Model(nn.Module):
    def __init__(self, core: Callable[..., Q]) -> None:
        super().__init__()
        self.core, self.qkv, self.lin = core, nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up = nn.Parameter(torch.randn(4, 2 * WIDTH, WIDTH))
        self.down = nn.Parameter(torch.randn(4, WIDTH, 2 * WIDTH))
        self.gate, self.one = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 1)
        self.pair, self.positions = nn.Parameter(torch.randn(2 * D)), nn.Parameter(torch.randn(N, N))

    def forward(self, x: Q) -> Q:
        q, k, v = self.qkv(x).view(B, -1, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
        return self.core(self, x, q, k, v)

    def experts(self, x: Q) -> Q:
        return torch.stack([self.lin(x), x, x * 2, x.relu()], 2)
