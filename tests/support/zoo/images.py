"""Forms of vision, video and sound models that were met outside the library of forms, as small modules."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from zoo.case import Case, Made, lively
from zoo.forms import bucketed
from zoo.spellings import PAD, D, Extra, H, N, Q, attend, randoms


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
def beside_a_class_token(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Decomposed relative positions are written onto the scores of the patches, not of the class token (MViT)."""
    b, h, n, d = q.shape
    scores = q @ k.mT / math.sqrt(d)
    grid = q[:, :, 1:].reshape(b, h, 4, 5, d)
    tall = torch.einsum("bhyxd,ykd->bhyxk", grid, extra["tall"])
    wide = torch.einsum("bhyxd,xkd->bhyxk", grid, extra["wide"])
    patches = scores[:, :, 1:, 1:].reshape(b, h, 4, 5, 4, 5) + tall[..., None] + wide[..., None, :]
    scores[:, :, 1:, 1:] = patches.reshape(b, h, n - 1, n - 1)
    return scores.softmax(-1) @ v


def by_regions(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """A window's own keys, its neighbours' and pooled ones each get a bias in place, some of them two (Focal)."""
    scores = q @ k.mT
    scores[..., :8] = scores[..., :8] + extra["near"][extra["bucket"].view(-1)].view(-1, 8, H).permute(2, 0, 1)
    scores[..., 8:15] = scores[..., 8:15] + extra["far"]
    scores[..., 15:] = scores[..., 15:] + extra["pooled"]
    scores[..., 15:] = scores[..., 15:] + extra["hidden"].masked_fill(extra["hidden"] > 0, -100.0)
    return scores.softmax(-1) @ v


def linear_under_masks(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Linear attention whose queries, keys and values are multiplied with masks of their tokens (LoFTR)."""
    seen = extra["seen"][:, None, :, None]
    q, k, v = (F.elu(q) + 1) * seen, (F.elu(k) + 1) * seen, v * seen / v.shape[2]
    total = 1 / (torch.einsum("bhid,bhd->bhi", q, k.sum(2)) + 1e-6)
    return torch.einsum("bhid,bhde,bhi->bhie", q, torch.einsum("bhjd,bhje->bhde", k, v), total) * v.shape[2]


REGIONS = {
    "near": randoms(9, H), "bucket": torch.arange(N * 8).view(N, 8) % 9, "far": randoms(H, N, 7),
    "pooled": randoms(H, N, 6), "hidden": randoms(6),
}  # fmt: skip
IMAGES = (
    Case("criss-cross", criss_cross, 2, "rows of one softmax that its two parts have in other orders", dtypes=BOTH,
         golden=1),
    Case("criss-cross-dynamic", criss_cross, 2, "the same for unknown sizes", dynamic=True, backward=True),
    Case("autocast-off", attend(autocast_off, table=randoms(16, H)), 1, "a region that turns off what is not on"),
    Case("beside-a-class-token", attend(beside_a_class_token, tall=randoms(4, 4, D), wide=randoms(5, 5, D)), 1,
         "products of other things than keys, read inside of a part only", golden=0, backward=True),
    Case("by-regions", attend(by_regions, **REGIONS), 1, "parts of one product written to, some twice", golden=0),
    Case("linear-under-masks", attend(linear_under_masks, seen=PAD), 1, "sums of masked keys", kept=1, dynamic=True),
    Case("scaled-by-length", attend(scaled_by_length), 2, "floats that unknown sizes decide", dynamic=True, golden=1),
)  # fmt: skip
