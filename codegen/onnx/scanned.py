"""A recurrence over the turns of a `Scan` as the operator `LinearAttention`.

    q (T, b, heads, d)    k (T, b, shared, d)    v (T, b, shared, e)    decay (T, b, shared, d or 1)
    rate (T, b, shared or 1, 1): `shared` are the heads of keys, as many as those of queries or a divisor
"""

from __future__ import annotations

import torch

from attncc.codegen.onnx.emitter import Inexpressible
from attncc.codegen.onnx.linear import OPSET, ir_value
from attncc.codegen.onnx.nodes import Value


def scanned(
    q: Value, k: Value, v: Value, state: Value, decay: Value | None, rate: Value | None, *, rule: str, scale: float,
    domain: str, opset: int,
) -> tuple[Value, Value]:  # fmt: skip
    """((T, b, heads, e), (b, heads of keys, d, e)), both in float32. Raises Inexpressible."""
    if not domain and opset < OPSET:
        raise Inexpressible(f"LinearAttention is of opset {OPSET}")
    nodes = q.nodes
    tokens, batch, heads, _ = q.shape
    shared, channels = k.shape[2], v.shape[3]
    known = [heads, *(n for x in (k, v, decay) if x is not None for n in x.shape[2:])]
    if not all(isinstance(n, int) for n in (*known, q.shape[3])):
        raise Inexpressible("its heads or channels are open")
    if rate is not None and rate.shape[2] != shared:
        rate = rate.expand([tokens, batch, shared, 1])
    given = [*(_flat(x) for x in (q, k, v)), state.to(torch.float32), *(x and _flat(x) for x in (decay, rate))]
    while given[-1] is None:
        given.pop()
    wide = nodes.call(
        "LinearAttention", given, torch.float32, (batch, tokens, heads * channels), domain,
        more=[(torch.float32, (batch, shared, k.shape[3], channels))], q_num_heads=heads, kv_num_heads=shared,
        update_rule=rule, scale=scale,
    )  # fmt: skip
    last = ir_value(wide, 1, (batch, shared, k.shape[3], channels))
    split = nodes.call(
        "Reshape", (wide, nodes.constant([0, 0, heads, channels])), torch.float32, (batch, tokens, heads, channels)
    )  # fmt: skip
    return split.permute(1, 0, 2, 3), last


def _flat(x: Value) -> Value:
    """(b, T, heads * channels) of (T, b, heads, channels)."""
    tokens, batch, heads, channels = x.shape
    wide = x.nodes.constant([0, 0, heads * channels])
    turned = x.to(torch.float32).permute(1, 0, 2, 3)
    return x.nodes.call("Reshape", (turned, wide), torch.float32, (batch, tokens, heads * channels))
