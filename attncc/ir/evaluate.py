"""Evaluating an expression in plain torch, over broadcastable index grids."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from attncc.ir.expr import Const, Expr, Index, Load, Op, Size, Var, walk

Value = torch.Tensor | bool | int | float
Fn = Callable[..., Value]

DTYPE_OF = {
    "f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "i64": torch.int64,
    "i32": torch.int32, "i16": torch.int16, "i8": torch.int8, "u8": torch.uint8, "bool": torch.bool,
}  # fmt: skip
NAME_OF = {dtype: name for name, dtype in DTYPE_OF.items()}


def _tensor(x: Value) -> torch.Tensor:
    return x if isinstance(x, torch.Tensor) else torch.tensor(x)


def _rounder(dtype: torch.dtype) -> Fn:
    return lambda x: _tensor(x).to(dtype)


_TORCH: dict[str, Fn] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "floordiv": lambda a, b: torch.div(_tensor(a), b, rounding_mode="floor"),
    "mod": lambda a, b: torch.remainder(_tensor(a), b),
    "truncdiv": lambda a, b: torch.div(_tensor(a), b, rounding_mode="trunc"),
    "neg": lambda a: -a,
    "abs": lambda a: _tensor(a).abs(),
    "min": lambda a, b: torch.minimum(*_both(a, b)),
    "max": lambda a, b: torch.maximum(*_both(a, b)),
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "and": lambda a, b: torch.logical_and(_tensor(a), _tensor(b)),
    "or": lambda a, b: torch.logical_or(_tensor(a), _tensor(b)),
    "not": lambda a: torch.logical_not(_tensor(a)),
    "int": lambda a: _tensor(a).to(torch.int64),
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
    "pow": torch.pow,
    "isnan": torch.isnan,
    "sin": torch.sin,
    "cos": torch.cos,
}


def _both(a: Value, b: Value) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = _tensor(a), _tensor(b)
    kind = torch.promote_types(x.dtype, y.dtype)
    return x.to(kind), y.to(kind)


class Evaluator:
    """Evaluates expressions with `leaves` bound to broadcastable tensors, float arithmetic in `compute`.

    With `rounding` the model's rounding points are honoured, otherwise they are skipped (which is more accurate).
    Results are kept: a shared subexpression is computed once.
    """

    def __init__(
        self,
        leaves: Mapping[Expr, torch.Tensor],
        tensors: Mapping[str, torch.Tensor],
        compute: torch.dtype,
        *,
        rounding: bool = False,
    ) -> None:
        self.known: dict[Expr, torch.Tensor] = dict(leaves)
        self.tensors, self.compute, self.rounding = tensors, compute, rounding
        device = next((t.device for t in tensors.values()), torch.device("cpu"))
        self.device = device

    def __call__(self, root: Expr) -> torch.Tensor:
        for node in walk(root):
            if node not in self.known:
                self.known[node] = self._compute(node)
        return self.known[root]

    def _compute(self, node: Expr) -> torch.Tensor:
        match node:
            case Const(value):
                dtype = {"bool": torch.bool, "int": torch.int64, "float": self.compute}[node.kind]
                return torch.tensor(value, dtype=dtype, device=self.device)
            case Load(tensor, index):
                return self._load(self.tensors[tensor], tuple(self.known[c] for c in index))
            case Op("where", (c, a, b)):
                return torch.where(self.known[c], self.known[a], self.known[b])
            case Op("float", (a,)):
                return self.known[a].to(self.compute)
            case Op(("bf16" | "f16" | "f32") as name, (a,)):
                value = self.known[a]
                return value.to(DTYPE_OF[name]).to(self.compute) if self.rounding else value
            case Op(name, args):
                return _tensor(_TORCH[name](*(self.known[a] for a in args)))
            case Index(name) | Size(name) | Var(name):
                raise KeyError(f"no value for {name}")
        raise TypeError(type(node).__name__)

    def _load(self, source: torch.Tensor, index: tuple[torch.Tensor, ...]) -> torch.Tensor:
        value = source[torch.broadcast_tensors(*index)] if index else source
        if value.dtype.is_floating_point:
            return value.to(self.compute)
        return value if value.dtype == torch.bool else value.to(torch.int64)
