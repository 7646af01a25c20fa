"""Nodes of ONNX by calling torch: a `Value` stands for a tensor, and what is done to it becomes nodes.

What evaluates expressions and rearranges results in torch is thereby written once (`attncc.ir`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import onnx_ir as ir
import torch

#: Element types by their torch names.
TYPES: dict[torch.dtype, ir.DataType] = {
    torch.float32: ir.DataType.FLOAT, torch.float16: ir.DataType.FLOAT16, torch.float64: ir.DataType.DOUBLE,
    torch.bfloat16: ir.DataType.BFLOAT16, torch.int64: ir.DataType.INT64, torch.int32: ir.DataType.INT32,
    torch.int16: ir.DataType.INT16, torch.int8: ir.DataType.INT8, torch.uint8: ir.DataType.UINT8,
    torch.bool: ir.DataType.BOOL,
}  # fmt: skip

#: An extent: a number, or a vector of one int64 that holds it.
Extent = Any


class Nodes:
    """The nodes that are made, in order. `shared` holds masks by what they are made of, for the attentions to come:
    layers share theirs."""

    def __init__(self, prefix: str, shared: dict[object, Value] | None = None) -> None:
        self.prefix, self.made = prefix, list[ir.Node]()
        self.shared: dict[object, Value] = {} if shared is None else shared

    def call(
        self, op: str, inputs: Sequence[Value | None], dtype: torch.dtype, shape: Sequence[Extent], domain: str = "",
        more: Sequence[tuple[torch.dtype, Sequence[Extent]]] = (), **attributes: Any,
    ) -> Value:  # fmt: skip
        """What a node gives first; `shape` are its extents, `more` types and extents of what it gives too. Inputs that
        are left out are None."""
        name = f"{self.prefix}/{op}_{len(self.made)}"
        given = [None if x is None else x.value for x in inputs]
        node = ir.node(op, given, attributes, domain=domain, name=name, num_outputs=1 + len(more))
        for n, (held, (kind, extents)) in enumerate(zip(node.outputs, [(dtype, shape), *more], strict=True)):
            held.name = f"{name}_out{n or ''}"
            held.dtype = TYPES[kind]
            held.shape = ir.Shape([d if isinstance(d, int) else None for d in extents])
        out = node.outputs[0]
        self.made.append(node)
        return Value(self, out, dtype, tuple(shape))

    def constant(self, x: Any, dtype: torch.dtype = torch.int64) -> Value:
        """A number or a list of them."""
        data = torch.tensor(x, dtype=dtype)
        wide = data.float() if dtype == torch.bfloat16 else data
        array = ir.tensor(cast(Any, wide.numpy()))
        found = self.call("Constant", (), wide.dtype, data.shape, value=array)
        return found if wide.dtype == dtype else found.to(dtype)

    def vector(self, extents: Sequence[Extent]) -> Value:
        """Extents as a vector; -1 where one alone is not known."""
        unknown = [n for n in extents if not isinstance(n, int)]
        if len(unknown) <= 1:
            return self.constant([n if isinstance(n, int) else -1 for n in extents])
        parts = [self.constant([n]) if isinstance(n, int) else n for n in extents]
        return self.call("Concat", parts, torch.int64, (len(parts),), axis=0)

    def whole(self, extents: Sequence[Extent]) -> Value:
        """The same with every extent known when it runs."""
        parts = [self.constant([n]) if isinstance(n, int) else n for n in extents]
        return parts[0] if len(parts) == 1 else self.call("Concat", parts, torch.int64, (len(parts),), axis=0)


class Value:
    """A tensor of the graph, with the methods of torch's that the interpreters of `attncc.ir` call."""

    def __init__(self, nodes: Nodes, value: ir.Value, dtype: torch.dtype, shape: tuple[Extent, ...]) -> None:
        self.nodes, self.value, self.dtype, self.shape = nodes, value, dtype, shape
        self.device = torch.device("cpu")

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def extent(self, dim: int) -> Extent:
        """The extent of a dimension: a number, or made when it runs."""
        n = self.shape[dim]
        if isinstance(n, int):
            return n
        return self.nodes.call("Shape", (self,), torch.int64, (1,), start=dim, end=dim + 1)

    def to(self, dtype: torch.dtype) -> Value:
        if dtype == self.dtype:
            return self
        return self.nodes.call("Cast", (self,), dtype, self.shape, to=int(TYPES[dtype]))

    def permute(self, *dims: Any) -> Value:
        order = list(dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims)
        if order == list(range(self.ndim)):
            return self
        producer = self.value.producer()
        if producer is not None and producer.op_type == "Transpose" and "perm" in producer.attributes:
            inner, x = list(producer.attributes["perm"].as_ints()), producer.inputs[0]
            assert x is not None
            shape: list[Extent] = [None] * self.ndim
            for at, d in enumerate(inner):
                shape[d] = self.shape[at]
            return Value(self.nodes, x, self.dtype, tuple(shape)).permute([inner[d] for d in order])
        return self.nodes.call("Transpose", (self,), self.dtype, [self.shape[d] for d in order], perm=order)

    def reshape(self, *shape: Any) -> Value:
        wanted = list(shape[0] if len(shape) == 1 and not isinstance(shape[0], int | Value) else shape)
        same = all(a is b or (isinstance(a, int) and a == b) for a, b in zip(wanted, self.shape, strict=False))
        if same and len(wanted) == self.ndim:
            return self
        return self.nodes.call("Reshape", (self, self.nodes.vector(wanted)), self.dtype, wanted)

    def unsqueeze(self, dim: int) -> Value:
        dim = dim + self.ndim + 1 if dim < 0 else dim
        shape = [*self.shape[:dim], 1, *self.shape[dim:]]
        return self.nodes.call("Unsqueeze", (self, self.nodes.constant([dim])), self.dtype, shape)

    def squeeze(self, dims: Sequence[int]) -> Value:
        dims = [d % self.ndim for d in dims]
        shape = [n for d, n in enumerate(self.shape) if d not in dims]
        return self.nodes.call("Squeeze", (self, self.nodes.constant(dims)), self.dtype, shape) if dims else self

    def select(self, dim: int, at: int) -> Value:
        if self.shape[dim] == 1 and at == 0:
            return self.squeeze([dim])
        shape = [n for d, n in enumerate(self.shape) if d != dim]
        return self.nodes.call("Gather", (self, self.nodes.constant(at)), self.dtype, shape, axis=dim)

    def expand(self, *shape: Any) -> Value:
        wanted = list(shape[0] if len(shape) == 1 and not isinstance(shape[0], int | Value) else shape)
        if all(a is b or (isinstance(a, int) and a == b) for a, b in zip(wanted, self.shape, strict=False)):
            return self
        return self.nodes.call("Expand", (self, self.nodes.whole(wanted)), self.dtype, wanted)

    def sum(self, dims: Sequence[int]) -> Value:
        shape = [n for d, n in enumerate(self.shape) if d not in dims]
        return self.nodes.call("ReduceSum", (self, self.nodes.constant(list(dims))), self.dtype, shape, keepdims=0)

    def contiguous(self) -> Value:
        return self

    def new_full(self, shape: Sequence[int], value: Any, *, dtype: torch.dtype) -> Value:
        assert not shape
        return self.nodes.constant(value, dtype)

    def __getitem__(self, index: tuple[Value, ...]) -> Value:
        """Elements at broadcast places."""
        if len(index) == 1:
            return self.nodes.call("Gather", (self, index[0]), self.dtype, index[0].shape, axis=0)
        every: Value = index[0] * 0
        for x in index[1:]:
            every = every + x * 0
        places = [(x + every).unsqueeze(-1) for x in index]
        shape = [*every.shape, len(places)]
        joined = self.nodes.call("Concat", places, torch.int64, shape, axis=-1)
        return self.nodes.call("GatherND", (self, joined), self.dtype, every.shape)

    def __add__(self, other: Any) -> Value:
        return _binary("Add", self, other)

    def __radd__(self, other: Any) -> Value:
        return _binary("Add", other, self)

    def __mul__(self, other: Any) -> Value:
        return _binary("Mul", self, other)

    def __rmul__(self, other: Any) -> Value:
        return _binary("Mul", other, self)

    def __sub__(self, other: Any) -> Value:
        return _binary("Sub", self, other)

    def __floordiv__(self, other: Any) -> Value:
        return _floor_divided(self, other)

    def __neg__(self) -> Value:
        return _unary("Neg", self)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in FUNCTIONS:
            raise NotImplementedError(f"{getattr(func, '__name__', func)} has no node of ONNX")
        return FUNCTIONS[func](*args, **(kwargs or {}))


def _nodes(*xs: Any) -> Nodes:
    return next(x.nodes for x in xs if isinstance(x, Value))


def _shape(*xs: Value) -> list[Extent]:
    """The shape that values are broadcast to."""
    rank = max(x.ndim for x in xs)
    found: list[Extent] = []
    for d in range(-rank, 0):
        own = [x.shape[d] for x in xs if -d <= x.ndim and x.shape[d] != 1]
        found.append(next((n for n in own if isinstance(n, int)), own[0] if own else 1))
    return found


def _pair(a: Any, b: Any) -> tuple[Value, Value]:
    nodes = _nodes(a, b)
    dtype = next(x.dtype for x in (a, b) if isinstance(x, Value))
    left, right = (x if isinstance(x, Value) else nodes.constant(x, dtype) for x in (a, b))
    if left.dtype != right.dtype:
        wide = torch.promote_types(left.dtype, right.dtype)
        left, right = left.to(wide), right.to(wide)
    return left, right


def _binary(op: str, a: Any, b: Any, dtype: torch.dtype | None = None) -> Value:
    left, right = _pair(a, b)
    return left.nodes.call(op, (left, right), dtype or left.dtype, _shape(left, right))


def _unary(op: str, x: Value, dtype: torch.dtype | None = None) -> Value:
    return x.nodes.call(op, (x,), dtype or x.dtype, x.shape)


def _floor_divided(a: Any, b: Any) -> Value:
    """Integers divided towards minus infinity, where ONNX divides towards zero."""
    whole = _binary("Div", a, b)
    rest = _binary("Mod", a, b)  # whose sign is that of the divisor
    exact = _binary("Div", _binary("Sub", a, rest), b)
    whole.nodes.made = [n for n in whole.nodes.made if n is not whole.value.producer()]
    return exact


def _divided(a: Any, b: Any, *, rounding_mode: str | None = None) -> Value:
    return _floor_divided(a, b) if rounding_mode == "floor" else _binary("Div", a, b)


def _where(c: Value, a: Any, b: Any) -> Value:
    if not isinstance(a, Value) and not isinstance(b, Value):
        a = c.nodes.constant(a, torch.float32)
    left, right = _pair(a, b)
    return c.nodes.call("Where", (c, left, right), left.dtype, _shape(c, left, right))


def _compared(op: str) -> Callable[[Any, Any], Value]:
    return lambda a, b: _binary(op, a, b, torch.bool)


def _unequal(a: Any, b: Any) -> Value:
    return _unary("Not", _binary("Equal", a, b, torch.bool))


def _called(op: str) -> Callable[[Any, Any], Value]:
    return lambda a, b: _binary(op, a, b)


def _applied(op: str, dtype: torch.dtype | None = None) -> Callable[[Value], Value]:
    return lambda x: _unary(op, x, dtype)


#: What functions of torch are in ONNX.
FUNCTIONS: dict[Any, Callable[..., Value]] = {
    torch.add: _called("Add"), torch.sub: _called("Sub"), torch.mul: _called("Mul"), torch.pow: _called("Pow"),
    torch.remainder: _called("Mod"), torch.minimum: _called("Min"), torch.maximum: _called("Max"),
    torch.logical_and: _called("And"), torch.logical_or: _called("Or"), torch.logical_not: _applied("Not"),
    torch.lt: _compared("Less"), torch.gt: _compared("Greater"),
    torch.le: _compared("LessOrEqual"), torch.eq: _compared("Equal"), torch.ne: _unequal,
    torch.div: _divided, torch.where: _where, torch.neg: _applied("Neg"), torch.abs: _applied("Abs"),
    torch.exp: _applied("Exp"), torch.log: _applied("Log"), torch.tanh: _applied("Tanh"), torch.sqrt: _applied("Sqrt"),
    torch.sigmoid: _applied("Sigmoid"), torch.erf: _applied("Erf"), torch.floor: _applied("Floor"),
    torch.ceil: _applied("Ceil"), torch.round: _applied("Round"), torch.sin: _applied("Sin"),
    torch.cos: _applied("Cos"), torch.isnan: _applied("IsNaN", torch.bool),
}  # fmt: skip
