"""An attention as ONNX's standard operator `Attention` (opset 23), with the smallest mask that says the same.

    q (batch, heads, rows, d)   k (batch, heads or fewer, keys, d)   v (.., keys, e)
    mask (batch or 1, heads or 1, rows, keys)

Which forms onnxruntime computes, and how, is in the table of tests/unit/test_onnxruntime_attention.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch

from attncc.codegen.onnx.nodes import Extent, Nodes, Value
from attncc.ir import Access, Attention, Axis, Const, Expr, Op, S, Size, W
from attncc.ir.build import TRUE, op
from attncc.ir.dense import Dense, dense
from attncc.ir.evaluate import DTYPE_OF, Evaluator
from attncc.ir.expr import Load, loads, mentions
from attncc.ir.views import is_view, view_of

#: What onnxruntime's kernel computes natively.
NATIVE = ("f32", "f16")
#: Added to what is hidden where a row that sees nothing gives the mean: the kernel gives zero for -inf and for the
#: lowest float.
_MEAN_FILL = {"f32": -1e30, "f16": -6e4}


class Inexpressible(Exception):
    """The operator does not compute this attention. The message says why, in a few words."""


def attention(a: Attention, tensors: Sequence[Value], sizes: Mapping[Size, Extent]) -> Value:
    """(*batch, rows, e): the output of `a`, whose tensors and sizes are given. Raises Inexpressible, before any node
    that matters is made."""
    gate, a = _gated(a)
    form = dense(a)
    if form is None:
        raise Inexpressible("its equation is not that of the operator")
    if a.dtype not in NATIVE:
        raise Inexpressible(f"onnxruntime has no kernel for {a.dtype}")
    if a.slope and not form.settled:
        raise Inexpressible("rows that see nothing follow their scores")
    emitter = _Emitter(a, form, tensors, sizes)
    out = emitter.emit()
    if gate is None:
        return out
    rows = emitter.pairs(gate).squeeze([-1]).unsqueeze(-1)
    return torch.where(rows, out, emitter.nodes.constant(0.0, out.dtype))  # type: ignore[call-overload]


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


class _Emitter:
    def __init__(self, a: Attention, form: Dense, tensors: Sequence[Value], sizes: Mapping[Size, Extent]) -> None:
        self.a, self.form, self.sizes = a, form, sizes
        self.tensors = {t.name: x for t, x in zip(a.tensors, tensors, strict=True)}
        self.nodes: Nodes = tensors[0].nodes

    def extent(self, axis: Axis) -> Extent:
        x = axis.extent
        return int(x.value) if isinstance(x, Const) else self.sizes[x]

    def emit(self) -> Value:
        a = self.a
        q = self.four(self.operand(a.q, a.i, a.d, 1))
        group = self.group()
        k, v = (self.four(self.operand(x, a.j, last, group)) for x, last in ((a.k, a.d), (a.v, a.e)))
        inputs = [q, k, v]
        how: dict[str, Any] = {"scale": float(self.form.scale)}
        if self.form.cap:
            how["softcap"] = float(self.form.cap)
        if self.form.causal:
            how["is_causal"] = 1
        key = self.key()
        mask = self.nodes.shared.get(key)
        if mask is None:
            mask = self.mask()
        if mask is not None:
            self.nodes.shared[key] = mask
            inputs.append(mask)
        batch, heads, rows, _ = q.shape
        out = self.nodes.call("Attention", inputs, DTYPE_OF[a.dtype], (batch, heads, rows, v.shape[-1]), **how)
        if a.empty == "nan" and not self.form.settled:
            out = self.with_nan(out)
        return out if len(a.batch) == 2 else out.reshape([self.extent(x) for x in (*a.batch, a.i, a.e)])

    def group(self) -> int:
        """How many heads share keys and values."""
        a = self.a
        if len(a.batch) != 2 or not isinstance(a.batch[1].extent, Const):
            return 1
        head, count = a.batch[1].index, int(a.batch[1].extent.value)
        found: set[int] = set()
        for access in (a.k, a.v):
            shared = [x for x in access.index if mentions(x, head)]
            if not shared:
                found.add(count)
            elif shared[0] is head:
                found.add(1)
            elif isinstance(shared[0], Op) and shared[0].name == "floordiv" and shared[0].args[0] is head:
                by = shared[0].args[1]
                at = access.index.index(shared[0])
                whole = isinstance(by, Const) and a.tensor(access.tensor).shape[at] == Const(count // int(by.value))
                found.add(int(by.value) if isinstance(by, Const) and whole and count % int(by.value) == 0 else 0)
            else:
                found.add(0)
        return found.pop() if len(found) == 1 and 0 not in found else 1

    def repeats(self, access: Access) -> int:
        """How many heads in a row share what an operand holds for one."""
        a = self.a
        for x, n in zip(access.index, a.tensor(access.tensor).shape, strict=True):
            match x:
                case Op("floordiv", (head, Const(by))) if len(a.batch) == 2 and head is a.batch[1].index:
                    count = a.batch[1].extent
                    if isinstance(count, Const) and isinstance(n, Const) and int(n.value) * int(by) == int(count.value):
                        return int(by)
                case _:
                    pass
        return 1

    def operand(self, access: Access, row: Axis, last: Axis, group: int) -> Value:
        """(*batch, row, last), with as many heads as there are groups of `group`."""
        a = self.a
        by = self.repeats(access) if group == 1 else 1
        if by > 1:
            x = self.operand(access, row, last, by)
            batch, heads, rows, channels = x.shape
            wide = x.unsqueeze(2).expand([batch, heads, by, rows, channels])
            return self.nodes.call(
                "Reshape", (wide, self.nodes.constant([0, heads * by, -1, channels])), x.dtype,
                (batch, heads * by, rows, channels),
            ) if isinstance(channels, int) else wide.reshape([batch, heads * by, rows, channels])  # fmt: skip
        axes = [*a.batch, row, last]
        index = tuple(
            a.batch[1].index if group > 1 and isinstance(x, Op) and mentions(x, a.batch[1].index) else x
            for x in access.index
        )
        load = Load(access.tensor, index, "float")
        if not is_view(load, axes):
            raise Inexpressible(f"{access.tensor} is read at other places than its own")
        source, shape = self.tensors[access.tensor], a.tensor(access.tensor).shape
        extents = [self.extent(x) for x in axes]
        if group > 1:
            extents[1] = int(extents[1]) // group
        for x, n in zip(index, shape, strict=True):
            own = next((e for e, axis in zip(extents, axes, strict=True) if axis.index is x), None)
            if isinstance(own, int) and n != Const(own):
                raise Inexpressible(f"{access.tensor} is read in part")
        value = view_of(load, source, axes)  # type: ignore[arg-type] # it stands for a tensor
        return value.expand(extents)  # type: ignore[return-value]

    def four(self, x: Value) -> Value:
        """(batch, heads, .., ..) of (*batch, .., ..)."""
        count = x.ndim - 2
        if count == 2:
            return x
        if count < 2:
            for _ in range(2 - count):
                x = x.unsqueeze(count)
            return x
        *_, heads, rows, last = x.shape
        if sum(not isinstance(n, int) for n in (heads, rows, last)):
            raise Inexpressible("several of its extents are open beside those of three batch axes")
        return self.nodes.call(
            "Reshape", (x, self.nodes.constant([-1, heads, rows, last])), x.dtype, (None, heads, rows, last)
        )

    def with_nan(self, out: Value) -> Value:
        """NaN in rows that see nothing, where the operator gives zero."""
        seen = self.laid_out(self.pairs(self.form.mask)).to(torch.float32)
        most = self.nodes.call(
            "ReduceMax", (seen, self.nodes.constant([-1])), torch.float32, (*seen.shape[:-1], 1), keepdims=1
        )
        rows = torch.gt(most, 0.0)  # type: ignore[arg-type]
        return torch.where(rows, out, self.nodes.constant(float("nan"), out.dtype))  # type: ignore[call-overload]

    def key(self) -> object:
        """What the mask is made of, equal for attentions whose masks are."""
        a, form = self.a, self.form
        parts = [x for x in (form.mask, form.bias) if x is not None]
        read = tuple((n, self.tensors[n].value) for n in sorted({x.tensor for x in loads(*parts)}))
        axes = tuple((x.name, x.extent) for x in (*a.batch, a.i, a.j))
        sizes = tuple((s, n if isinstance(n, int) else n.value) for s, n in self.sizes.items())
        return form.mask, form.bias, form.settled, form.causal, a.empty, a.dtype, axes, sizes, read

    def mask(self) -> Value | None:
        """What hides keys and is added to scores, as one tensor; None where the causal flag says it all."""
        a, form = self.a, self.form
        dtype = DTYPE_OF[a.dtype]
        hidden = None if form.causal or form.mask is TRUE else self.pairs(form.mask)
        bias = None if form.bias is None else self.pairs(form.bias).to(dtype)
        if hidden is not None and not form.settled and a.empty == "mean":
            nothing = self.nodes.constant(0.0, dtype) if bias is None else bias
            found = torch.where(hidden, nothing, self.nodes.constant(_MEAN_FILL[a.dtype], dtype))  # type: ignore[call-overload]
        elif hidden is not None and bias is not None:
            found = torch.where(hidden, bias, self.nodes.constant(float("-inf"), dtype))  # type: ignore[call-overload]
        else:
            found = hidden if bias is None else bias
        return None if found is None else self.laid_out(cast(Value, found))

    def laid_out(self, x: Value) -> Value:
        """(batch or 1, heads or 1, rows, keys): the kernel wants the last two whole."""
        a = self.a
        pairs = (*a.batch, a.i, a.j)
        used = [axis for axis, n in zip(pairs, x.shape, strict=True) if n != 1]
        first = [self.extent(axis) if axis in used else 1 for axis in a.batch]
        if len(first) > 2 and any(axis in used for axis in a.batch[:-1]):
            first = [self.extent(axis) for axis in a.batch[:-1]] + first[-1:]
        x = x.expand([*first, self.extent(a.i), self.extent(a.j)])
        if len(first) <= 2:
            return self.four(x)
        return x.reshape([-1, *x.shape[-3:]]) if any(n != 1 for n in first[:-1]) else x.reshape([1, *x.shape[-3:]])

    def pairs(self, x: Expr) -> Value:
        """An expression over (*batch, rows, keys), with extent 1 where it does not depend on an axis."""
        a = self.a
        axes = (*a.batch, a.i, a.j)
        ev = Evaluator({}, {}, torch.float32, like=next(iter(self.tensors.values())))  # type: ignore[arg-type]
        ev.tensors = self.tensors  # type: ignore[assignment]
        for at, axis in enumerate(axes):
            if mentions(x, axis.index):
                ev.known[axis.index] = self.arange(axis, at, len(axes))  # type: ignore[assignment]
        for size, n in self.sizes.items():
            if mentions(x, size):
                value = self.nodes.constant(n) if isinstance(n, int) else n.squeeze([0])
                ev.known[size] = value  # type: ignore[assignment]
        for load in loads(x):
            if is_view(load, axes) and self.whole(load, axes):
                value = view_of(load, self.tensors[load.tensor], axes)  # type: ignore[arg-type]
                ev.known[load] = value.to(torch.float32) if load.kind == "float" else value
                if load.kind == "int":
                    ev.known[load] = value.to(torch.int64)
        found: Value = ev(x)  # type: ignore[assignment]
        return found if found.ndim == len(axes) else found.reshape([1] * len(axes))

    def whole(self, load: Load, axes: Sequence[Axis]) -> bool:
        """Whether a load reads each dimension from its first element to its last."""
        by_index = {axis.index: axis.extent for axis in axes}
        shape = self.a.tensor(load.tensor).shape
        return all(isinstance(x, Const) or by_index[x] == n for x, n in zip(load.index, shape, strict=True))  # type: ignore[index]

    def arange(self, axis: Axis, at: int, rank: int) -> Value:
        n = self.extent(axis)
        end = self.nodes.constant(n) if isinstance(n, int) else n.squeeze([0])
        places = self.nodes.call(
            "Range", (self.nodes.constant(0), end, self.nodes.constant(1)), torch.int64, (n,)
        )
        shape = [n if d == at else 1 for d in range(rank)]
        return places.reshape(shape)
