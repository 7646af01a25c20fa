"""What onnxruntime runs natively and fastest, by its own operators (`com.microsoft`) and the standard one.

The rows of `CPU` are in the order of what was measured (docs/convert.md, `attncc bench --suite onnx`), and
tests/unit/test_onnxruntime_attention.py holds what each computes against the installed version. Those of `CUDA` are
what onnxruntime's docs/OperatorKernels.md says that it has kernels for.
"""

from __future__ import annotations

from typing import Any

import torch

from attncc.codegen.onnx.attention import ATTENTION, Row, lengths, standard
from attncc.codegen.onnx.emitter import Emitter
from attncc.codegen.onnx.nodes import Value
from attncc.ir.build import TRUE
from attncc.ir.dense import sees_a_key
from attncc.ir.evaluate import DTYPE_OF
from attncc.ir.expr import Const, mentions

DOMAIN = "com.microsoft"
#: What hides a key so that a row of hidden ones gives the mean of its values: scores vanish beside it.
_LOWEST = float(torch.finfo(torch.float32).min)
_CAPPED = "onnxruntime is slower with capped scores than the nodes are"


def _packed(e: Emitter) -> str:
    a = e.a
    if len(a.batch) != 2:
        return "it has no axis of heads"
    known = (a.batch[1], a.d, a.e)
    return "" if all(isinstance(x.extent, Const) for x in known) else "its heads or channels are open"


def _grouped_refuses(e: Emitter, opset: int) -> str:
    """GroupQueryAttention: causal self-attention, all of it, by heads of equal widths."""
    a, v, form = e.a, e.visible, e.form
    if why := _packed(e):
        return why
    if not v.causal or a.i.extent != a.j.extent or a.d.extent != a.e.extent:
        return "it is no causal self-attention"
    if int(a.d.extent.value) % 8:  # type: ignore[union-attr]
        return "its head size is no multiple of 8"
    if form.cap:
        return _CAPPED
    if v.without_lengths is not TRUE:
        return "its mask is more than causal, a window and lengths"
    if v.window and v.lengths is not None:
        return "rows behind the end of a sequence see other keys in a window, in half precision"
    if v.lengths is not None and a.empty == "mean" and not sees_a_key(a):
        return "rows that see nothing give the mean"
    if a.sink is not None and mentions(a.sink, a.i.index, a.batch[0].index):
        return "its sink is not one number per head"
    return ""


def _grouped(e: Emitter, opset: int) -> Value:
    a, v = e.a, e.visible
    q, k, w = e.operands
    batch, heads, rows, _ = q.shape
    kv_heads, dtype = k.shape[1], DTYPE_OF[a.dtype]
    nodes, keys = e.nodes, e.extent(a.j)
    inputs: list[Value | None] = [*(e.flat(x) for x in (q, k, w)), None, None, _last_keys(e), _total(e)]
    bias = e.mask(TRUE, e.form.bias)
    sink = None if a.sink is None else e.pairs(a.sink)
    if bias is not None or sink is not None:
        inputs += [None, None, None, bias]
    if sink is not None:
        inputs.append(sink.expand([1, heads, 1, 1]).reshape([heads]).to(dtype))
    how: dict[str, Any] = {"num_heads": heads, "kv_num_heads": kv_heads, "scale": float(e.form.scale)}
    if v.window:
        how["local_window_size"] = v.window
    present = [(dtype, (batch, kv_heads, keys, x)) for x in (k.shape[-1], w.shape[-1])]
    out = nodes.call(
        "GroupQueryAttention", inputs, dtype, (batch, rows, heads * w.shape[-1]), DOMAIN, more=present, **how
    )
    found = e.unflat(out, heads)
    if v.lengths is None or sees_a_key(a):
        return found
    return e.filled(found, float("nan") if a.empty == "nan" else 0.0)


def _last_keys(e: Emitter) -> Value:
    """(batch,): the number of the last key of each sequence."""
    if e.visible.lengths is not None:
        return lengths(e, torch.int32, 1)
    a = e.a

    def make() -> Value:
        n, batch = e.extent(a.j), e.extent(a.batch[0])
        if isinstance(n, int) and isinstance(batch, int):
            return e.nodes.constant([n - 1] * batch, torch.int32)
        last = e.nodes.constant([n - 1]) if isinstance(n, int) else n - 1
        return last.expand([batch]).to(torch.int32)

    return e.shared(("last keys", e.key()), make)


def _total(e: Emitter) -> Value:
    def make() -> Value:
        n = e.extent(e.a.j)
        return e.nodes.constant(n, torch.int32) if isinstance(n, int) else n.squeeze([0]).to(torch.int32)

    return e.shared(("keys", e.key()), make)


def _multi_refuses(e: Emitter, opset: int) -> str:
    """MultiHeadAttention: as many heads of keys as of queries; padding by a mask of keys, or lengths."""
    a, v, form = e.a, e.visible, e.form
    if why := _packed(e):
        return why
    if e.group != 1:
        return "its heads share keys"
    if a.sink is not None:
        return "a sink is no part of the operator"
    if form.cap:
        return _CAPPED
    if v.window or v.rest is not TRUE or (v.causal and a.i.extent != a.j.extent):
        return "its mask is more than causal, lengths and a mask of keys"
    if form.bias is not None and v.padding is None and v.lengths is None:
        return "its bias is as well given to the standard operator"
    return ""


def _multi(e: Emitter, opset: int) -> Value:
    a, v = e.a, e.visible
    q, k, w = e.operands
    batch, heads, rows, _ = q.shape
    inputs: list[Value | None] = [e.flat(x) for x in (q, k, w)]
    how: dict[str, Any] = {"num_heads": heads, "scale": float(e.form.scale)}
    if v.causal:
        how["unidirectional"] = 1
    seen = _keys_seen(e)
    bias = e.mask(TRUE, e.form.bias)
    if seen is not None or bias is not None:
        inputs += [None, seen]
        how["mask_filter_value"] = _LOWEST
    if bias is not None:
        inputs.append(bias)
    dtype = DTYPE_OF[a.dtype]
    out = e.nodes.call("MultiHeadAttention", inputs, dtype, (batch, rows, heads * w.shape[-1]), DOMAIN, **how)
    found = e.unflat(out, heads)
    if seen is None or a.empty == "mean" or sees_a_key(a):
        return found
    return e.filled(found, float("nan") if a.empty == "nan" else 0.0)


def _keys_seen(e: Emitter) -> Value | None:
    """What hides keys of a whole sequence: (batch,) lengths, or (batch, keys) of 0 and 1; int32 both."""
    a, v = e.a, e.visible
    if v.padding is None:
        return None if v.lengths is None else lengths(e, torch.int32)
    x = v.padding

    def make() -> Value:
        seen = e.pairs(x)
        return seen.squeeze([1, 2]).expand([e.extent(a.batch[0]), e.extent(a.j)]).to(torch.int32)

    return e.shared(("keys seen", e.key(x)), make)


def _flat_standard(e: Emitter, opset: int) -> Value:
    """The standard operator; heads lie side by side where the operands lie so already."""
    turned = [x.value.producer() for x in e.operands]
    lies = all(n is not None and n.op_type == "Transpose" and n not in e.nodes.made for n in turned)
    return standard(e, opset, flat=lies and not _packed(e))


def _standard_refuses(e: Emitter, opset: int) -> str:
    return _CAPPED if e.form.cap else ATTENTION.refuses(e, opset)


#: What the CPU provider runs, the fastest first.
CPU: tuple[Row, ...] = (
    Row("GroupQueryAttention", ("f32", "f16"), _grouped_refuses, _grouped),
    Row("MultiHeadAttention", ("f32", "f16"), _multi_refuses, _multi),
    Row("Attention", ("f32", "f16"), _standard_refuses, _flat_standard),
)
#: What the CUDA provider has kernels for.
CUDA: tuple[Row, ...] = (
    Row("GroupQueryAttention", ("f16", "bf16"), _grouped_refuses, _grouped),
    Row("MultiHeadAttention", ("f32", "f16", "bf16"), _multi_refuses, _multi),
    Row("Attention", ("f32", "f16", "bf16"), _standard_refuses, _flat_standard),
)
