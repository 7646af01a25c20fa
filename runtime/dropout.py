"""Operators that stand for dropout of attention weights while a graph is read: what is dropped is a function of words.

    dropped(weights, words, p)                      F.dropout(weights, p), the words of a row deciding for its keys
    dropped_attention(query, .., words, dropout_p)  scaled_dot_product_attention with such weights

Both are plain torch below, so a graph that keeps one runs on any device and has gradients to any order.
"""

from __future__ import annotations

from typing import Any, cast

import torch

from attncc.ir.streams import kept

_torch_library = cast(Any, torch.library)  # whose functions have partial types
_library = _torch_library.Library("attncc", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_library.define("dropped(Tensor weights, Tensor words, float p) -> Tensor", tags=_TAGS)
_library.define(
    "dropped_attention(Tensor query, Tensor key, Tensor value, Tensor words, Tensor? attn_mask, float dropout_p,"
    " bool is_causal, *, float? scale=None, bool enable_gqa=False) -> Tensor",
    tags=_TAGS,
)


def _dropped(weights: torch.Tensor, words: torch.Tensor, p: float) -> torch.Tensor:
    """`weights` (*rows, keys), those that stay divided by 1 - p; `words` are i32 (*rows, 2)."""
    factor = kept(words, weights.shape[-1], p).to(weights.dtype) * (1.0 / (1.0 - p))
    return weights * factor


def _dropped_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, words: torch.Tensor, attn_mask: torch.Tensor | None,
    dropout_p: float, is_causal: bool, *, scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """What `scaled_dot_product_attention` computes; `words` are i32 (*batch, rows, 2)."""
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(seen.logical_not(), float("-inf"))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(attn_mask.logical_not(), float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = scores.softmax(-1)
    weights = weights.masked_fill((scores == float("-inf")).all(-1, keepdim=True), 0.0)
    return _dropped(weights, words, dropout_p) @ value


_library.impl("dropped", _dropped, "CompositeImplicitAutograd")
_library.impl("dropped_attention", _dropped_attention, "CompositeImplicitAutograd")
dropped: Any = torch.ops.attncc.dropped.default
dropped_attention: Any = torch.ops.attncc.dropped_attention.default
