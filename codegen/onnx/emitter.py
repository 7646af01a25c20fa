"""What operators of ONNX take of an attention: its operands, and the smallest mask that says what it hides.

    q (batch, heads, rows, d)   k (batch, heads or fewer, keys, d)   v (.., keys, e)
    mask (batch or 1, heads or 1, rows, keys)

Which operator takes them is in `attncc.codegen.onnx.attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import torch

from attncc.codegen.onnx.nodes import Extent, Nodes, Value
from attncc.codegen.onnx.visible import Visible, visible
from attncc.ir import Access, Attention, Axis, Const, Expr, Op, Size, Tensor
from attncc.ir.build import TRUE
from attncc.ir.dense import Dense
from attncc.ir.evaluate import DTYPE_OF, Evaluator
from attncc.ir.expr import Load, loads, mentions
from attncc.ir.views import is_view, view_of

#: Added to what is hidden where a row that sees nothing gives the mean: kernels give zero for -inf and for the lowest
#: float.
_MEAN_FILL = {"f32": -1e30, "f16": -6e4, "bf16": -1e30}


class Inexpressible(Exception):
    """The operator does not compute this attention. The message says why, in a few words."""


class Emitter:
    """Makes the nodes of one attention, whose parts, tensors and sizes are given."""

    def __init__(self, a: Attention, form: Dense, tensors: Sequence[Value], sizes: Mapping[Size, Extent]) -> None:
        self.a, self.form, self.sizes = a, form, sizes
        self.tensors = {t.name: x for t, x in zip(a.tensors, tensors, strict=True)}
        self.nodes: Nodes = tensors[0].nodes

    def extent(self, axis: Axis) -> Extent:
        return _extent(axis, self.sizes)

    @cached_property
    def visible(self) -> Visible:
        return visible(self.a)

    @cached_property
    def operands(self) -> tuple[Value, Value, Value]:
        """q, k and v of four dimensions, keys and values with as many heads as there are."""
        a = self.a
        q = self.four(self.operand(a.q, a.i, a.d, 1))
        k, v = (self.four(self.operand(x, a.j, last, self.group)) for x, last in ((a.k, a.d), (a.v, a.e)))
        return q, k, v

    def shared(self, key: object, make: Callable[[], Value]) -> Value:
        """What the attentions to come may use too, made at the first."""
        held = self.nodes.shared.get(key)
        if held is None:
            held = self.nodes.shared[key] = make()
        return held

    def flat(self, x: Value) -> Value:
        """(batch, rows, heads * channels) of (batch, heads, rows, channels)."""
        batch, heads, rows, channels = x.shape
        if not isinstance(heads, int) or not isinstance(channels, int):
            raise Inexpressible("the number of its heads is open")
        turned = x.permute(0, 2, 1, 3)
        return self.nodes.call(
            "Reshape", (turned, self.nodes.constant([0, 0, heads * channels])), x.dtype, (batch, rows, heads * channels)
        )

    def unflat(self, x: Value, heads: int) -> Value:
        """(batch, heads, rows, channels) of (batch, rows, heads * channels)."""
        batch, rows, width = x.shape
        split = self.nodes.call(
            "Reshape", (x, self.nodes.constant([0, 0, heads, width // heads])), x.dtype,
            (batch, rows, heads, width // heads),
        )  # fmt: skip
        return split.permute(0, 2, 1, 3)

    def result(self, out: Value) -> Value:
        """(*batch, rows, e) of (batch, heads, rows, e)."""
        a = self.a
        return out if len(a.batch) == 2 else out.reshape([self.extent(x) for x in (*a.batch, a.i, a.e)])

    @cached_property
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

    def filled(self, out: Value, fill: float) -> Value:
        """`fill` in rows that see nothing."""
        rows: Any = torch.gt(self._seen_by_row(), 0)  # type: ignore[arg-type]
        return torch.where(rows, out, self.nodes.constant(fill, out.dtype))  # type: ignore[call-overload]

    def _seen_by_row(self) -> Value:
        """Something above zero for each row that sees a key: (batch or 1, heads or 1, rows or 1, 1)."""
        v, nodes = self.visible, self.nodes
        plain = v.rest is TRUE and not v.window and len(self.a.batch) == 2
        if plain and v.lengths is not None:  # who sees a key sees the first
            return self.pairs(v.lengths)
        seen = self.pairs(v.padding if plain and v.padding is not None else self.form.mask).to(torch.int32)
        if plain and v.causal:  # row i sees one of the keys up to i, of which there are as many as rows
            sums = nodes.call("CumSum", (seen, nodes.constant(3)), torch.int32, seen.shape)
            return sums.permute(0, 1, 3, 2)
        seen = seen if plain else self.laid_out(seen)
        return nodes.call(
            "ReduceMax", (seen, nodes.constant([-1])), torch.int32, (*seen.shape[:-1], 1), keepdims=1
        )

    def key(self, *parts: Expr | None) -> object:
        """What expressions over pairs are made of, equal for attentions where they are the same."""
        a = self.a
        found = [x for x in parts if x is not None]
        read = tuple((n, self.tensors[n].value) for n in sorted({x.tensor for x in loads(*found)}))
        axes = tuple((x.name, x.extent) for x in (*a.batch, a.i, a.j))
        sizes = tuple((s, n if isinstance(n, int) else n.value) for s, n in self.sizes.items())
        return parts, axes, sizes, read

    def mask(self, seen: Expr, bias: Expr | None, *, as_float: bool = False) -> Value | None:
        """What hides all but `seen` and is added to scores, as one tensor; None where there is nothing to say. Of
        booleans where nothing is added, unless they are asked for as floats."""
        if seen is TRUE and bias is None:
            return None
        a, settled = self.a, self.form.settled
        how = "mask", settled, a.empty, a.dtype, as_float
        return self.shared((how, self.key(seen, bias)), lambda: self._mask(seen, bias, as_float))

    def _mask(self, seen: Expr, bias: Expr | None, as_float: bool) -> Value:
        a = self.a
        dtype = DTYPE_OF[a.dtype]
        visible = None if seen is TRUE else self.pairs(seen)
        added = None if bias is None else self.pairs(bias).to(dtype)
        mean = visible is not None and not self.form.settled and a.empty == "mean"
        if visible is not None and (added is not None or mean or as_float):
            nothing = self.nodes.constant(0.0, dtype) if added is None else added
            fill = self.nodes.constant(_MEAN_FILL[a.dtype] if mean else float("-inf"), dtype)
            added = torch.where(visible, nothing, fill)  # type: ignore[call-overload]
        return self.laid_out(cast(Value, visible if added is None else added))

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
        return over((*a.batch, a.i, a.j), x, self.tensors, a.tensor, self.sizes)


def over(
    axes: Sequence[Axis], x: Expr, tensors: Mapping[str, Value], declared: Callable[[str], Tensor],
    sizes: Mapping[Size, Extent], known: Mapping[Expr, Value] | None = None,
) -> Value:  # fmt: skip
    """An expression over some axes, with extent 1 where it does not depend on one. `known` are values of parts."""
    nodes = next(iter(tensors.values())).nodes
    ev = Evaluator({}, {}, torch.float32, like=next(iter(tensors.values())))  # type: ignore[arg-type]
    ev.tensors = tensors  # type: ignore[assignment]
    for at, axis in enumerate(axes):
        if mentions(x, axis.index):
            ev.known[axis.index] = _arange(nodes, _extent(axis, sizes), at, len(axes))  # type: ignore[assignment]
    for size, n in sizes.items():
        if mentions(x, size):
            value = nodes.constant(n) if isinstance(n, int) else n.squeeze([0])
            ev.known[size] = value  # type: ignore[assignment]
    for load in loads(x):
        if is_view(load, axes) and _whole(load, axes, declared(load.tensor).shape):
            value = view_of(load, tensors[load.tensor], axes)  # type: ignore[arg-type]
            ev.known[load] = value.to(torch.float32) if load.kind == "float" else value
            if load.kind == "int":
                ev.known[load] = value.to(torch.int64)
    for part, value in (known or {}).items():
        ev.known[part] = value  # type: ignore[assignment]
    found: Value = ev(x)  # type: ignore[assignment]
    return found if found.ndim == len(axes) else found.reshape([1] * len(axes))


def _whole(load: Load, axes: Sequence[Axis], shape: Sequence[Expr]) -> bool:
    """Whether a load reads each dimension from its first element to its last."""
    by_index = {axis.index: axis.extent for axis in axes}
    return all(isinstance(x, Const) or by_index[x] == n for x, n in zip(load.index, shape, strict=True))  # type: ignore[index]


def _extent(axis: Axis, sizes: Mapping[Size, Extent]) -> Extent:
    x = axis.extent
    return int(x.value) if isinstance(x, Const) else sizes[x]


def _arange(nodes: Nodes, n: Extent, at: int, rank: int) -> Value:
    end = nodes.constant(n) if isinstance(n, int) else n.squeeze([0])
    places = nodes.call("Range", (nodes.constant(0), end, nodes.constant(1)), torch.int64, (n,))
    return places.reshape([n if d == at else 1 for d in range(rank)])
