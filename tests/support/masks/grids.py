"""Masks over grids of tokens, row-major: (mask, grid, tiles that divide it)."""

from __future__ import annotations

from dataclasses import replace

import torch

from attncc.ir import Attention, Axis, Const
from masks.catalogue import Mask, causal_neighbourhood, neighbourhood

Y, X = ("i // 32", "j // 32"), ("i % 32", "j % 32")
FRAME, LINE, COLUMN = ("i // 256", "j // 256"), ("i // 16 % 16", "j // 16 % 16"), ("i % 16", "j % 16")
PLANE = ((32, 32), (8, 8))
VIDEO = ((8, 16, 16), (4, 4, 4))
MASKS = {
    "2-D": (neighbourhood(*Y, 32, 7) + " and " + neighbourhood(*X, 32, 7), *PLANE),
    "2-D, even window": (neighbourhood(*Y, 32, 8) + " and " + neighbourhood(*X, 32, 12), *PLANE),
    "2-D, strided": (neighbourhood(*Y, 32, 16, 8) + " and " + neighbourhood(*X, 32, 16, 8), *PLANE),
    "2-D, causal in one": (causal_neighbourhood(*Y, 32, 9) + " and " + neighbourhood(*X, 32, 9), *PLANE),
    "2-D, window": ("abs(i // 32 - j // 32) <= 4 and abs(i % 32 - j % 32) <= 4", *PLANE),
    "3-D": (neighbourhood(*FRAME, 8, 3) + " and " + neighbourhood(*LINE, 16, 5) + " and "
            + neighbourhood(*COLUMN, 16, 5), *VIDEO),
    "3-D, sliding tiles": (neighbourhood(*FRAME, 8, 4, 4) + " and " + neighbourhood(*LINE, 16, 8, 4) + " and "
            + neighbourhood(*COLUMN, 16, 8, 4), *VIDEO),
}  # fmt: skip


def grid(mask: str, shape: tuple[int, ...]) -> Attention:
    n = Const(torch.Size(shape).numel())
    return replace(Mask(mask).attention("b = 1, h = 1"), i=Axis("i", n), j=Axis("j", n))
