"""The row of ONNX's operator `Attention`, in all its forms.

    p = softmax(cap tanh(scale q kT / cap) + mask),  o = p v;  a row that sees nothing gives zero

The cap comes before the mask in every version, as their documents say and onnxruntime computes. The causal edge and
windows count from the keys before the first query: those of the past, or of a cache that holds `nonpad` keys
(https://onnx.ai/onnx/operators/onnx__Attention.html).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from attncc.frontends.onnx.values import DTYPES, tensor


def attention(
    q: Any, k: Any, v: Any, mask: Any = None, past_k: Any = None, past_v: Any = None, nonpad: Any = None, *,
    is_causal: int = 0, scale: float | None = None, q_num_heads: int = 0, kv_num_heads: int = 0, softcap: float = 0.0,
    qk_matmul_output_mode: int = 0, softmax_precision: int | None = None, left_window_size: int = -1,
    right_window_size: int = -1, outputs: int = 1,
) -> Any:  # fmt: skip
    """(output, present keys, present values, scores)."""
    flat = q.ndim == 3
    if flat:
        q = q.unflatten(-1, (q_num_heads, -1)).transpose(1, 2)
        k, v = (x.unflatten(-1, (kv_num_heads, -1)).transpose(1, 2) for x in (k, v))
    if past_k is not None:
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
    windows = left_window_size >= 0 or right_window_size >= 0
    start: Any = 0 if past_k is None else past_k.shape[2]
    if nonpad is not None:
        start = (tensor(nonpad) - q.shape[2]).reshape(-1, 1, 1, 1) if past_k is None else start
    plain = not softcap and not windows and nonpad is None and outputs < 4 and softmax_precision is None
    mask = None if mask is None else tensor(mask)
    if plain and (mask is None or (not is_causal and mask.shape[-1] == k.shape[2])) and not (is_causal and start):
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=bool(is_causal), scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        scores = None
    else:
        seen = _seen(q, k, start, nonpad, bool(is_causal), left_window_size, right_window_size)
        precision = None if softmax_precision is None else DTYPES[softmax_precision]
        out, scores = _spelled(q, k, v, mask, seen, scale, softcap, qk_matmul_output_mode, precision)
    out = out.transpose(1, 2).flatten(2) if flat else out
    return (out, k, v, scores)[:outputs]


def _seen(q: Any, k: Any, start: Any, nonpad: Any, causal: bool, left: int, right: int) -> torch.Tensor | None:
    """Which keys a row sees by their places; None where all."""
    rows, keys = torch.arange(q.shape[2])[:, None] + start, torch.arange(k.shape[2])
    found = [keys <= rows] if causal else []
    found += [keys >= rows - left] if left >= 0 else []
    found += [keys <= rows + right] if right >= 0 else []
    found += [keys < tensor(nonpad).reshape(-1, 1, 1, 1)] if nonpad is not None else []
    seen = None
    for x in found:
        seen = x if seen is None else seen & x
    return seen


def _spelled(
    q: Any, k: Any, v: Any, mask: torch.Tensor | None, seen: torch.Tensor | None, scale: float | None, cap: float,
    mode: int, precision: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    raw = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    capped = cap * torch.tanh(raw / cap) if cap else raw
    added = capped
    if mask is not None:
        # a mask shorter than the keys hides the rest
        mask = F.pad(mask, (0, k.shape[2] - mask.shape[-1]), value=False if mask.dtype == torch.bool else float("-inf"))
        hidden = mask.dtype == torch.bool
        added = added.masked_fill(~mask, float("-inf")) if hidden else added + mask
    added = added if seen is None else added.masked_fill(~seen, float("-inf"))
    none = (added == float("-inf")).all(-1, keepdim=True)
    weights = torch.softmax(added if precision is None else added.to(precision), -1).to(q.dtype)
    weights = weights.masked_fill(none, 0.0)
    return weights @ v, (raw, capped, added, weights)[mode]
