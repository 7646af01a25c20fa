"""Forms of vision, video and sound models that were met outside the library of forms, as small modules."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from zoo_case import Case, Made, lively
from zoo_forms import bucketed
from zoo_spellings import Extra, H, Q, attend, randoms


class CrissCross(nn.Module):
    """Each pixel attends to its column, itself left out, and its row: one softmax over both, whose two parts meet
    values that lie in other orders (CCNet)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Conv2d(width, 4, 1), nn.Conv2d(width, 4, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Q) -> Q:
        b, _, h, w = x.shape

        def columns(t: Q) -> Q:
            return t.permute(0, 3, 1, 2).reshape(b * w, -1, h)

        def rows(t: Q) -> Q:
            return t.permute(0, 2, 1, 3).reshape(b * h, -1, w)

        q, k, v = self.q(x), self.k(x), self.v(x)
        own = torch.eye(h, dtype=torch.bool)
        down = torch.bmm(columns(q).mT, columns(k)).masked_fill(own, -torch.inf).view(b, w, h, h).transpose(1, 2)
        along = torch.bmm(rows(q).mT, rows(k)).view(b, h, w, w)
        weights = torch.cat([down, along], 3).softmax(3)
        of_columns = weights[..., :h].transpose(1, 2).reshape(b * w, h, h)
        of_rows = weights[..., h:].reshape(b * h, w, w)
        vertical = torch.bmm(columns(v), of_columns.mT).view(b, w, -1, h).permute(0, 2, 3, 1)
        return vertical + torch.bmm(rows(v), of_rows.mT).view(b, h, -1, w).permute(0, 2, 1, 3) + x


def criss_cross() -> Made:
    x = torch.randn(2, 16, 6, 9, generator=torch.Generator().manual_seed(15))
    return lively(CrissCross()), (x,), {}


def autocast_off(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Rotary embeddings are computed where autocast is off, and nowhere is it on."""
    with torch.autocast("cpu", enabled=False):
        q = F.normalize(q, dim=-1) * 3
    return bucketed(q, k, v, extra)


def scaled_by_length(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Channels that attend to channels are scaled by the number of tokens; some models' tokens too."""
    n = q.shape[2]
    first = F.scaled_dot_product_attention(q, k, v, scale=math.log2(n) / n)
    return first + (q @ k.mT / math.sqrt(n) * n**-0.25).softmax(-1) @ v


BOTH = (torch.float32, torch.bfloat16)
IMAGES = (
    Case("criss-cross", criss_cross, 2, "rows of one softmax that its two parts have in other orders", dtypes=BOTH,
         golden=1),
    Case("criss-cross-dynamic", criss_cross, 2, "the same for unknown sizes", dynamic=True, backward=True),
    Case("autocast-off", attend(autocast_off, table=randoms(16, H)), 1, "a region that turns off what is not on"),
    Case("scaled-by-length", attend(scaled_by_length), 2, "floats that unknown sizes decide", dynamic=True, golden=1),
)  # fmt: skip
