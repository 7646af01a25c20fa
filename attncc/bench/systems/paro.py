"""Row 14, PAROAttention (arXiv 2506.16054): each head has an order of frames, rows and columns, and a map of blocks."""

from __future__ import annotations

import torch

from attncc.bench.systems.blocks import Blocked, chosen, flex
from attncc.bench.systems.system import Made, System, drawn, settled


def _make(full: bool) -> Made:
    (f, h, w), dim, heads, block = ((16, 16, 16), 256, 4, 64) if full else ((2, 4, 5), 8, 2, 8)
    n = f * h * w
    order = torch.arange(n).view(f, h, w).permute(1, 2, 0).flatten()  # a frame's tokens together last
    return settled(Blocked(dim, heads, block, order), *drawn((1, n, dim)), chosen(heads, n // block, 0.25))


SYSTEMS = (
    System(14, "PAROAttention", "one order, written out", "policy", _make, 1, flex=flex,
           claim="1.9-2.7x end to end at 20-30% density",
           gap="one order for all heads, 32-bit products: no 8-bit scores, no calibration of orders yet"),
)  # fmt: skip
