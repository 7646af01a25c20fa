"""A linear attention as the operator `LinearAttention`: of opset 27, or of onnxruntime's own domain, which has a kernel
for it.

    S_t = exp(g_t) S_(t-1) + beta_t k_t (v_t - exp(g_t) S_(t-1)^T k_t)^T, or without what the delta rule takes off
    o_t = scale * q_t^T S_t
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from attncc.codegen.onnx.emitter import Inexpressible, over
from attncc.codegen.onnx.nodes import Extent, Nodes, Value
from attncc.ir import Axis, Const, Expr, Linear, Op, Size
from attncc.ir.build import add, const, op
from attncc.ir.evaluate import DTYPE_OF
from attncc.ir.expr import Load, mentions
from attncc.ir.linear import UNIT, X, Z

#: The version of the standard operators that has it.
OPSET = 27
_RULES = {("add", False): "linear", ("add", True): "gated", ("delta", False): "delta", ("delta", True): "gated_delta"}


def linear(
    a: Linear, tensors: Sequence[Value], sizes: Mapping[Size, Extent], *, domain: str, opset: int
) -> dict[str, Value]:
    """Outputs of `a` by name: `out` (*batch, i, e), `state` (*batch, d, e). Raises Inexpressible."""
    if not domain and opset < OPSET:
        raise Inexpressible(f"LinearAttention is of opset {OPSET}")
    if a.sees != "past":
        raise Inexpressible("every query sees every key: two products are all that it is")
    if a.compute_dtype != "f32" or not 1 <= len(a.batch) <= 2:
        raise Inexpressible("it is in float64, or of more than two batch axes")
    if not all(isinstance(x.extent, Const) for x in (a.batch[-1], a.d, a.e)):
        raise Inexpressible("its heads or channels are open")
    return _Emitter(a, tensors, sizes, domain).emit()


def logarithm(x: Expr) -> Expr | None:
    """log(x), where x is shown to be positive, or zero; None where it is not."""
    match x:
        case Const(value) if value >= 0:
            return const(math.log(value) if value else -math.inf)
        case Op("exp", (y,)):
            return y
        case Op("sigmoid", _):
            return op("log", x)
        case Op("mul", (y, z)):
            parts = logarithm(y), logarithm(z)
            return None if parts[0] is None or parts[1] is None else add(parts[0], parts[1])
        case Op("where", (c, y, z)):
            parts = logarithm(y), logarithm(z)
            return None if parts[0] is None or parts[1] is None else op("where", c, parts[0], parts[1])
        case _:
            return None


class _Emitter:
    def __init__(self, a: Linear, tensors: Sequence[Value], sizes: Mapping[Size, Extent], domain: str) -> None:
        self.a, self.sizes, self.domain = a, sizes, domain
        self.tensors = {t.name: x for t, x in zip(a.tensors, tensors, strict=True)}
        self.nodes: Nodes = tensors[0].nodes
        self.heads = int(cast(Const, a.batch[-1].extent).value)

    def emit(self) -> dict[str, Value]:
        a = self.a
        keys = (*a.batch, a.j)
        q = self.over((*a.batch, a.i, a.d), a.phi_q, Load(a.q.tensor, a.q.index, "float"))
        k = self.over((*keys, a.d), a.phi_k, Load(a.k.tensor, a.k.index, "float"))
        v = self.over((*keys, a.e), X, Load(a.v.tensor, a.v.index, "float"))
        inputs: list[Value | None] = [self.flat(q), self.flat(k), None, None, None, None]
        if a.state is not None:
            state = self.over((*a.batch, a.d, a.e), X, Load(a.state.tensor, a.state.index, "float"))
            inputs[3] = state if len(a.batch) == 2 else state.unsqueeze(0)
        if a.decay is not UNIT:
            inputs[4] = self.flat(self.gate())
        if a.rule == "delta":
            if mentions(a.rate, a.d.index, a.e.index):
                raise Inexpressible("its rate differs by channel")
            inputs[5] = self.flat(self.full((*keys,), a.rate).unsqueeze(-1))
        elif a.rate is not UNIT:
            if mentions(a.rate, a.d.index):
                raise Inexpressible("its rate differs by channel of the keys")
            v = v * self.over((*keys, a.e), a.rate)
        inputs[2] = self.flat(v)
        out, state = self.call(inputs, _RULES[a.rule, a.decay is not UNIT])
        found = {"out": out, "state": state if len(a.batch) == 2 else state.squeeze([0])}
        if a.over is not None:
            ones = self.nodes.constant([1.0], torch.float32).expand([*(self.extent(x) for x in keys), 1])
            weight, _ = self.call([inputs[0], inputs[1], self.flat(ones), None, None, None], "linear")
            rows = (*a.batch, a.i)
            by = over(rows, a.over, self.tensors, a.tensor, self.sizes, {Z: weight.squeeze([-1])})
            found["out"] = cast(Any, torch.div)(found["out"], by.unsqueeze(-1))
        found["out"] = found["out"].to(DTYPE_OF[a.dtype])
        return {name: found[name] for name in a.outputs}

    def extent(self, axis: Axis) -> Extent:
        x = axis.extent
        return int(x.value) if isinstance(x, Const) else self.sizes[x]

    def over(self, axes: Sequence[Axis], x: Expr, element: Load | None = None) -> Value:
        a = self.a
        known: dict[Expr, Value] = {}
        if element is not None:
            known[X] = over(axes, element, self.tensors, a.tensor, self.sizes)
        found = over(axes, x, self.tensors, a.tensor, self.sizes, known)
        return found.to(torch.float32).expand([self.extent(axis) for axis in axes])

    def full(self, axes: Sequence[Axis], x: Expr) -> Value:
        return self.over(axes, x)

    def gate(self) -> Value:
        """Logarithms of what states decay by: (*batch, j, d), or (*batch, j, 1)."""
        a = self.a
        g = logarithm(a.decay)
        if g is None:
            raise Inexpressible("its decay is not shown to be positive")
        if mentions(g, a.e.index):
            raise Inexpressible("its decay differs by channel of the values")
        keys = (*a.batch, a.j)
        return self.over((*keys, a.d), g) if mentions(g, a.d.index) else self.over(keys, g).unsqueeze(-1)

    def flat(self, x: Value) -> Value:
        """(batch, tokens, heads * channels) of (*batch, tokens, channels)."""
        x = x if len(self.a.batch) == 2 else x.unsqueeze(0)
        batch, heads, rows, channels = x.shape
        wide = self.nodes.constant([0, 0, heads * channels])
        return self.nodes.call(
            "Reshape", (x.permute(0, 2, 1, 3), wide), x.dtype, (batch, rows, heads * channels)
        )

    def call(self, inputs: Sequence[Value | None], rule: str) -> tuple[Value, Value]:
        """((*batch, i, channels), (batch, heads, d, channels))."""
        q, k, v = inputs[:3]
        assert q is not None and k is not None and v is not None
        given = list(inputs)
        while given[-1] is None:
            given.pop()
        channels = v.shape[-1] // self.heads
        state = (q.shape[0], self.heads, k.shape[-1] // self.heads, channels)
        flat = self.nodes.call(
            "LinearAttention", given, torch.float32, (*q.shape[:2], v.shape[-1]), self.domain,
            more=[(torch.float32, state)], q_num_heads=self.heads, kv_num_heads=self.heads, update_rule=rule, scale=1.0,
        )  # fmt: skip
        last = ir_value(flat, 1, state)
        split = self.nodes.call(
            "Reshape", (flat, self.nodes.constant([0, 0, self.heads, channels])), torch.float32,
            (*q.shape[:2], self.heads, channels),
        )  # fmt: skip
        out = split.permute(0, 2, 1, 3)
        return out if len(self.a.batch) == 2 else out.squeeze([0]), last


def ir_value(first: Value, number: int, shape: tuple[Extent, ...]) -> Value:
    """What the node of a value gives at another place."""
    node = first.value.producer()
    assert node is not None
    return Value(first.nodes, node.outputs[number], first.dtype, shape)
