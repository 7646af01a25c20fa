"""Evaluating an expression in plain torch, over broadcastable index grids."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch

from attncc.ir.streams import mix
from attncc.ir.terms import OPS, ROUNDINGS, Const, Expr, Load, Op, walk

DTYPE_OF = {
    "f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "i64": torch.int64,
    "i32": torch.int32, "i16": torch.int16, "i8": torch.int8, "u8": torch.uint8, "bool": torch.bool,
}  # fmt: skip
NAME_OF = {dtype: name for name, dtype in DTYPE_OF.items()}


Unary = Callable[[torch.Tensor], torch.Tensor]
Binary = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_UNARY: dict[str, Unary] = {
    "neg": torch.neg,
    "abs": torch.abs,
    "not": torch.logical_not,
    "int": lambda a: a.to(torch.int64),
    "exp": torch.exp,
    "log": torch.log,
    "log1p": torch.log1p,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "erf": torch.erf,
    "floor": torch.floor,
    "ceil": torch.ceil,
    "round": torch.round,
    "isnan": torch.isnan,
    "sin": torch.sin,
    "cos": torch.cos,
    "stop": torch.Tensor.detach,
}

_BINARY: dict[str, Binary] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "floordiv": lambda a, b: torch.div(a, b, rounding_mode="floor"),
    "mod": torch.remainder,
    "truncdiv": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
    "min": torch.minimum,
    "max": torch.maximum,
    "minfirst": lambda a, b: torch.where((b < a) | b.isnan(), b, a),
    "maxfirst": lambda a, b: torch.where((b > a) | b.isnan(), b, a),
    "lt": torch.lt,
    "le": torch.le,
    "eq": torch.eq,
    "ne": torch.ne,
    "and": torch.logical_and,
    "or": torch.logical_or,
    "pow": torch.pow,
}

assert {"where", "float", "mix", *ROUNDINGS} | set(_UNARY) | set(_BINARY) == set(OPS)


class Evaluator:
    """Evaluates expressions with `leaves` bound to broadcastable tensors, float arithmetic in `compute`.

    With `rounding` the model's rounding points are honoured, otherwise they are skipped (which is more accurate).
    Results are kept: a shared subexpression is computed once. With `checked` a negative index raises IndexError, where
    torch would count from the end; an index past the end raises always. Constants are made `like` a tensor where one is
    given: then everything is a method of a tensor, and a trace that stands in for tensors can follow.
    """

    def __init__(
        self,
        leaves: Mapping[Expr, torch.Tensor],
        tensors: Mapping[str, torch.Tensor],
        compute: torch.dtype,
        *,
        rounding: bool = False,
        checked: bool = False,
        like: torch.Tensor | None = None,
    ) -> None:
        self.known: dict[Expr, torch.Tensor] = dict(leaves)
        self.tensors, self.compute, self.rounding = tensors, compute, rounding
        self.checked, self.like = checked, like
        self.device = next((t.device for t in tensors.values()), torch.device("cpu"))

    def __call__(self, root: Expr) -> torch.Tensor:
        for node in walk(root, beyond=self.known):
            self.known[node] = self._compute(node)
        return self.known[root]

    def _compute(self, node: Expr) -> torch.Tensor:
        match node:
            case Const(value):
                dtype = {"bool": torch.bool, "int": torch.int64, "float": self.compute}[node.kind]
                if self.like is not None:
                    return self.like.new_full((), value, dtype=dtype)
                return torch.tensor(value, dtype=dtype, device=self.device)
            case Load(tensor, index):
                return self._load(self.tensors[tensor], tuple(self.known[c] for c in index))
            case Op("where", (c, a, b)):
                return torch.where(self.known[c], self.known[a], self.known[b])
            case Op("mix", (a, b, j)):
                return mix(self.known[a], self.known[b], self.known[j])
            case Op("float", (a,)):
                return self.known[a].to(self.compute)
            case Op(name, (a,)) if name in ROUNDINGS:
                value = self.known[a]
                return value.to(DTYPE_OF[name]).to(self.compute) if self.rounding else value
            case Op(name, (a,)):
                return _UNARY[name](self.known[a])
            case Op(name, (a, b)):
                return _BINARY[name](self.known[a], self.known[b])
            case _:
                raise KeyError(f"no value for {node!r}")

    def _load(self, source: torch.Tensor, index: tuple[torch.Tensor, ...]) -> torch.Tensor:
        if self.checked and any(type(c) is torch.Tensor and bool((c < 0).any()) for c in index):
            raise IndexError("a load has a negative index")
        value = source[index]
        if value.dtype.is_floating_point:
            return value.to(self.compute)
        return value if value.dtype == torch.bool else value.to(torch.int64)


_operator, _torch = cast(Any, operator), cast(Any, torch)  # whose functions have partial types
#: Integer arithmetic of sizes, on whatever stands for them: numbers, symbols of a trace, nodes of a graph.
ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "floordiv": _operator.floordiv, "mod": operator.mod,
    "neg": operator.neg, "max": _torch.sym_max, "min": _torch.sym_min,
}  # fmt: skip


def int_value(x: Expr, table: Mapping[Expr, Any]) -> Any:
    """The value of an integer expression over sizes, given those. Raises KeyError for other operations and leaves."""
    if isinstance(x, Const):
        return x.value
    if isinstance(x, Op):
        return ARITHMETIC[x.name](*(int_value(a, table) for a in x.args))
    return table[x]
