"""Library calls that hold a whole attention, written out in the operations they are made of.

torch runs `nn.TransformerEncoderLayer` and `nn.MultiheadAttention` as one operation each in inference. The shadow of a
graph runs what is here in their place, so that the attention in them is found; an edit then takes the parts over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

Tensor = torch.Tensor


def native_multi_head_attention(
    query: Tensor, key: Tensor, value: Tensor, embed_dim: int, num_head: int, qkv_weight: Tensor, qkv_bias: Tensor,
    proj_weight: Tensor, proj_bias: Tensor, mask: Tensor | None = None, need_weights: bool = True,
    average_attn_weights: bool = True, mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`torch._native_multi_head_attention`: (B, T, C) queries, keys and values; the weights where they are asked for.

    A mask hides keys where it is not zero, whatever its dtype. `mask_type` says what it is: 0 of (T, T), 1 of (B, T)
    keys, 2 of (B, H, T, T)."""
    if query is key and key is value:
        parts = F.linear(query, qkv_weight, qkv_bias).chunk(3, -1)
    else:
        split = zip((query, key, value), qkv_weight.chunk(3), qkv_bias.chunk(3), strict=True)
        parts = tuple(F.linear(x, w, b) for x, w, b in split)
    q, k, v = (x.unflatten(-1, (num_head, embed_dim // num_head)).transpose(1, 2) for x in parts)
    scores = (q * (embed_dim // num_head) ** -0.5) @ k.mT
    if mask is not None:
        hidden = mask.to(torch.bool)
        hidden = hidden[:, None, None] if mask_type == 1 else hidden
        scores = scores.masked_fill(hidden, float("-inf"))
    weights = scores.softmax(-1)
    out = F.linear((weights @ v).transpose(1, 2).flatten(2), proj_weight, proj_bias)
    if not need_weights:
        return out, None
    return out, weights.mean(1) if average_attn_weights else weights


def transformer_encoder_layer(
    src: Tensor, embed_dim: int, num_heads: int, qkv_weight: Tensor, qkv_bias: Tensor, proj_weight: Tensor,
    proj_bias: Tensor, use_gelu: bool, norm_first: bool, eps: float, norm_weight_1: Tensor, norm_bias_1: Tensor,
    norm_weight_2: Tensor, norm_bias_2: Tensor, ffn_weight_1: Tensor, ffn_bias_1: Tensor, ffn_weight_2: Tensor,
    ffn_bias_2: Tensor, mask: Tensor | None = None, mask_type: int | None = None,
) -> Tensor:  # fmt: skip
    """`torch._transformer_encoder_layer_fwd` on (B, T, C): attention and a layer of two products, each with its norm
    before (`norm_first`) or after."""

    def attention(x: Tensor) -> Tensor:
        return native_multi_head_attention(
            x, x, x, embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias, mask, False, True, mask_type
        )[0]

    def products(x: Tensor) -> Tensor:
        inner = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(inner) if use_gelu else F.relu(inner), ffn_weight_2, ffn_bias_2)

    def first(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def second(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    if norm_first:
        x = src + attention(first(src))
        return x + products(second(x))
    x = first(src + attention(src))
    return second(x + products(x))


#: What to call in place of a library call, on plain tensors.
PARTS: dict[object, Callable[..., Any]] = {
    torch._transformer_encoder_layer_fwd: transformer_encoder_layer,  # pyright: ignore[reportPrivateImportUsage]
    torch.ops.aten._transformer_encoder_layer_fwd.default: transformer_encoder_layer,
    torch._native_multi_head_attention: native_multi_head_attention,  # pyright: ignore[reportPrivateImportUsage]
    torch.ops.aten._native_multi_head_attention.default: native_multi_head_attention,
}
