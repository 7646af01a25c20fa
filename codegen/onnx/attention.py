"""Which operator of ONNX computes an attention: the first row of a table that takes it.

`STANDARD` is for any runtime that knows opset 23. Rows for onnxruntime are in `attncc.codegen.onnx.onnxruntime`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from attncc.codegen.onnx.dims import grouped, split_dims
from attncc.codegen.onnx.emitter import Emitter, Inexpressible
from attncc.codegen.onnx.nodes import Extent, Value
from attncc.ir import Access, Attention, Axis, Const, Expr, Op, S, Size, W
from attncc.ir.build import TRUE, op
from attncc.ir.dense import dense
from attncc.ir.evaluate import DTYPE_OF
from attncc.ir.expr import mentions


@dataclass(frozen=True)
class Row:
    """An operator: `dtypes` of its kernel, why it does not take an attention ("" where it does), and its nodes, which
    give (batch, heads, rows, e). `opset` is that of the standard operators in the file."""

    name: str
    dtypes: tuple[str, ...]
    refuses: Callable[[Emitter, int], str]
    emit: Callable[[Emitter, int], Value]


def attention(
    a: Attention, tensors: Sequence[Value], sizes: Mapping[Size, Extent], rows: Sequence[Row], opset: int
) -> tuple[str, Value]:
    """(operator, (*batch, rows, e)): the output of `a`, whose tensors and sizes are given, by the first of `rows` that
    takes it. Raises Inexpressible, before any node that matters is made."""
    whole = a
    a, tensors = grouped(*split_dims(a, tensors, sizes), sizes)
    gate, a = _gated(a)
    a, units = _with_batch(a)
    form = dense(replace(a, sink=None))
    if form is None:
        raise Inexpressible("its equation is not that of the operator")
    if a.slope and not form.settled:
        raise Inexpressible("rows that see nothing follow their scores")
    why = "no operator was asked for"
    for row in rows:
        emitter = Emitter(a, form, tensors, sizes)
        why = _foreign(row, a) or row.refuses(emitter, opset)
        if not why:
            out = emitter.result(row.emit(emitter, opset))
            if gate is not None:
                seen = emitter.pairs(gate).squeeze([-1]).unsqueeze(-1)
                zero = emitter.nodes.constant(0.0, out.dtype)
                out = cast(Value, torch.where(seen, out, zero))  # type: ignore[call-overload]
            out = out.squeeze(range(units))
            apart = [emitter.extent(x) for x in (*whole.batch, whole.i, whole.e)]
            return row.name, out if len(apart) == out.ndim else out.reshape(apart)
    raise Inexpressible(why)


def _foreign(row: Row, a: Attention) -> str:
    return "" if a.dtype in row.dtypes else f"onnxruntime has no kernel for {a.dtype}"


def _gated(a: Attention) -> tuple[Expr | None, Attention]:
    """(rows that are computed, the attention that computes all): weights that are zero for whole rows are zero in the
    output."""
    match a.weight:
        case Op("where", (c, x, y)) if not mentions(c, a.j.index, S, W):
            if x is W and y == Const(0.0):
                return c, replace(a, weight=W)
            if y is W and x == Const(0.0):
                return op("not", c), replace(a, weight=W)
        case _:
            pass
    return None, a


def _with_batch(a: Attention) -> tuple[Attention, int]:
    """(the attention with two batch axes at least, how many of extent 1 it got before the others): a batch of one
    sequence is none in the IR, and operators have it. Dimensions of extent 1 lie along the new axes."""
    units = max(0, 2 - len(a.batch))
    taken = {x.name for x in (*a.axes, *a.sizes, *a.tensors)}
    names = [x for x in ("one", "unit", "single", "sole") if x not in taken][:units]
    axes = tuple(Axis(x, Const(1)) for x in names)
    if not axes:
        return a, 0

    def along(access: Access) -> Access:
        left = list(axes)
        shape = a.tensor(access.tensor).shape
        index = [
            left.pop(0).index if left and x == Const(0) and n == Const(1) else x
            for x, n in zip(access.index, shape, strict=True)
        ]
        return Access(access.tensor, tuple(index))

    return replace(a, batch=(*axes, *a.batch), q=along(a.q), k=along(a.k), v=along(a.v), layout=()), units


# ---- the standard operator ------------------------------------------------------------------------------------------


def _standard_refuses(e: Emitter, opset: int) -> str:
    return "a sink is no part of the operator" if e.a.sink is not None else ""


def standard(e: Emitter, opset: int, *, flat: bool = False) -> Value:
    """`Attention`. `flat`: operands of three dimensions, heads side by side."""
    a, form = e.a, e.form
    how: dict[str, Any] = {"scale": float(form.scale)}
    if form.cap:
        how["softcap"] = float(form.cap)
    if form.causal:
        how["is_causal"] = 1
    q, k, v = e.operands
    batch, heads, rows, _ = q.shape
    channels = v.shape[-1]
    by_length = takes_lengths(e, opset)
    mask = e.mask(TRUE if form.causal else e.visible.without_lengths if by_length else form.mask, form.bias)
    inputs: list[Value | None] = [q, k, v]
    if flat:
        inputs = [e.flat(x) for x in (q, k, v)]
        how |= {"q_num_heads": heads, "kv_num_heads": k.shape[1]}
    if mask is not None or by_length:
        inputs.append(mask)
    if by_length:
        inputs += [None, None, lengths(e, torch.int64)]
    shape = (batch, rows, heads * channels) if flat else (batch, heads, rows, channels)
    out = e.nodes.call("Attention", inputs, DTYPE_OF[a.dtype], shape, **how)
    out = e.unflat(out, heads) if flat else out
    return e.filled(out, float("nan")) if a.empty == "nan" and not form.settled else out


def takes_lengths(e: Emitter, opset: int) -> bool:
    """Whether the lengths of a mask are the input `nonpad_kv_seqlen` (opset 24): a row that sees nothing gives zero."""
    v, a = e.visible, e.a
    return (
        opset >= 24 and v.lengths is not None and not v.causal and len(a.batch) == 2
        and (e.form.settled or a.empty != "mean")
    )  # fmt: skip


def lengths(e: Emitter, dtype: torch.dtype, less: int = 0) -> Value:
    """(batch,): how many keys each sequence has, less a number, from none to all."""
    a, x = e.a, e.visible.lengths
    assert x is not None

    def make() -> Value:
        extent = e.extent(a.j)
        last = e.nodes.constant(extent) if isinstance(extent, int) else extent.squeeze([0])
        found: Any = torch.minimum(e.pairs(x), last)  # type: ignore[arg-type]
        found = torch.maximum(found - less, cast(Any, e.nodes.constant(0)))
        whole = found.reshape([found.shape[0]]) if isinstance(found.shape[0], int) else _first(found)
        return whole.expand([e.extent(a.batch[0])]).to(dtype)

    return e.shared((("lengths", dtype, less), e.key(x)), make)


def _first(x: Value) -> Value:
    return x.nodes.call("Reshape", (x, x.nodes.constant([-1])), x.dtype, (x.shape[0],))


ATTENTION = Row("Attention", ("f32", "f16"), _standard_refuses, standard)
STANDARD: tuple[Row, ...] = (ATTENTION,)
