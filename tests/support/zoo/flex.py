"""flex_attention: score and mask functions, block masks made outside and inside the graph, captured tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import (
    BlockMask,
    and_masks,
    create_block_mask,
    flex_attention,
    noop_mask,
    or_masks,
)

from zoo.case import Case, Made, lively
from zoo.spellings import DOC, B, D, Extra, H, N, Q, attend, randoms, x

DOCUMENTS = {"doc": DOC}


def causal(b: Q, h: Q, i: Q, j: Q) -> Q:
    return j <= i


def near(b: Q, h: Q, i: Q, j: Q) -> Q:
    return (i - j).abs() < 4


def prefix(b: Q, h: Q, i: Q, j: Q) -> Q:
    return j < 5


def capped(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    def score(s: Q, b: Q, h: Q, i: Q, j: Q) -> Q:
        return torch.tanh(s / 3) * 3 - 0.1 * (i - j).abs()

    def seen(b: Q, h: Q, i: Q, j: Q) -> Q:
        return (j <= i) & (i - j < 6)

    return flex_attention(q, k, v, score_mod=score, block_mask=create_block_mask(seen, None, None, N, N, device="cpu"))


def documents(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Packed documents over grouped heads, the mask made from a tensor in the graph."""
    doc = extra["doc"]

    def seen(b: Q, h: Q, i: Q, j: Q) -> Q:
        return (doc[b, i] == doc[b, j]) & (i >= j)

    mask = create_block_mask(seen, B, None, N, N, device="cpu")
    return flex_attention(q, k[:, :2], v[:, :2], block_mask=mask, enable_gqa=True, scale=0.5)


def composed(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    seen = or_masks(prefix, and_masks(causal, near))
    return flex_attention(q, k, v, block_mask=create_block_mask(seen, None, None, N, N, device="cpu"))


def alibi(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """A learned slope a head."""

    def score(s: Q, b: Q, h: Q, i: Q, j: Q) -> Q:
        return s + extra["slopes"][h] * (j - i)

    return flex_attention(q, k, v, score_mod=score)


def masked_by_score(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """score_mod hides keys itself; rows that see nothing are zero."""

    def score(s: Q, b: Q, h: Q, i: Q, j: Q) -> Q:
        return torch.where((j <= i) & (i >= 4), s, -float("inf"))

    return flex_attention(q, k, v, score_mod=score)


def merged(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Two halves of the keys, joined by the logarithms of their sums."""
    halves = [flex_attention(q, k[:, :, part], v[:, :, part], return_lse=True) for part in (slice(0, 9), slice(9, N))]
    (a, m), (b, n) = halves
    weight = torch.sigmoid(m - n)[..., None].to(a.dtype)
    return a * weight + b * (1 - weight)


def routed(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Scores that read another layer's logits."""

    def score(s: Q, b: Q, h: Q, i: Q, j: Q) -> Q:
        return s + extra["gate"][h, i, j]

    return flex_attention(q, k[:, :, :7], v[:, :, :7], score_mod=score)


def counted(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """A score by an operation without a rule."""

    def score(s: Q, b: Q, h: Q, i: Q, j: Q) -> Q:
        return s + torch.special.i0(s)

    return flex_attention(q, k, v, score_mod=score)


def chosen_blocks(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Blocks of keys chosen by pooled scores: the tables are the mask."""
    pooled = q.mean(2) @ k.mean(2).mT
    first = (pooled.topk(1, -1).indices * 0).to(torch.int32).view(B, H, 1, 1)
    mask = BlockMask.from_kv_blocks(torch.ones_like(first)[..., 0], first, mask_mod=causal, seq_lengths=(N, N))
    return flex_attention(q, k, v, block_mask=mask)


class Outside(nn.Module):
    """A block mask made once, outside the graph, for every layer."""

    def __init__(self, mask: BlockMask) -> None:
        super().__init__()
        self.qkv, self.mask = nn.Linear(H * D, 3 * H * D), mask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], -1, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
        return flex_attention(q, k, v, block_mask=self.mask).transpose(1, 2).flatten(2)


def outside(make: Callable[[], BlockMask]) -> Callable[[], Made]:
    return lambda: (lively(Outside(make())), (x(),), {})


def by_function() -> BlockMask:
    return create_block_mask(and_masks(causal, near), None, None, N, N, device="cpu")


def everything() -> BlockMask:
    return create_block_mask(noop_mask, None, None, N, N, device="cpu")


def by_bits() -> BlockMask:
    """Within a row of four, or in the same of four phases."""

    def seen(b: Q, h: Q, i: Q, j: Q) -> Q:
        return ((i >> 2) == (j >> 2)) | ((i & 3) == (j & 3)) | (((i - j) & 1) == 5)

    return create_block_mask(seen, None, None, N, N, device="cpu")


def by_tables() -> BlockMask:
    blocks: Any = torch.ones(1, 1, 1, dtype=torch.int32)
    return BlockMask.from_kv_blocks(blocks, torch.zeros(1, 1, 1, 1, dtype=torch.int32), seq_lengths=(N, N))


class Growing(nn.Module):
    """Lengths known at the call only."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(H * D, 3 * H * D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[1]
        q, k, v = self.qkv(x).view(x.shape[0], n, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)

        def score(s: Q, b: Q, h: Q, i: Q, j: Q) -> Q:
            return s + (i - j) / n

        mask = create_block_mask(causal, None, None, n, n, device="cpu")
        return flex_attention(q, k, v, score_mod=score, block_mask=mask).transpose(1, 2).flatten(2)


def growing() -> Made:
    return lively(Growing()), (x(),), {}


BOTH = (torch.float32, torch.bfloat16)
FLEX = (
    Case("flex", attend(capped), 1, "score and block mask of flex_attention", dtypes=BOTH, golden=0),
    Case("flex-documents", attend(documents, **DOCUMENTS), 1, "a captured tensor in the mask, grouped heads", golden=0),
    Case("flex-composed", attend(composed), 1, "and_masks, or_masks", golden=0),
    Case("flex-alibi", attend(alibi, slopes=randoms(H)), 1, "a captured parameter"),
    Case("flex-masked-by-score", attend(masked_by_score), 1, "-inf in score_mod: empty rows are zero", golden=0),
    Case("flex-merged", attend(merged), 2, "logarithms of the sums are outputs", golden=0, dtypes=BOTH),
    Case("flex-routed", attend(routed, gate=randoms(H, N, 7)), 1, "a captured bias"),
    Case("flex-outside", outside(by_function), 1, "a block mask made outside the graph", golden=0),
    Case("flex-dynamic", growing, 1, "lengths known at the call only", dynamic=True, golden=0),
    Case("flex-no-rule", attend(counted), 0, "score_mod does what no rule knows", refused=1),
    Case("flex-chosen-blocks", attend(chosen_blocks), 0, "blocks chosen by data, not by a function", refused=1),
    Case("flex-by-tables", outside(by_tables), 1, "a block mask without a function"),
    Case("flex-noop", outside(everything), 1, "a block mask of a function that hides nothing"),
    Case("flex-bits", outside(by_bits), 1, "a mask function of bits"),
)  # fmt: skip
