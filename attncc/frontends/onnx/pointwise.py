"""Rows of the op table that work element by element: ONNX's name, and what torch does for it."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from attncc.frontends.onnx.values import DTYPES, Typed, Unsupported, is_number, on_host, plain, tensor

Row = Callable[..., Any]

_UNARY: dict[str, Row] = {
    "Abs": torch.abs, "Acos": torch.acos, "Asin": torch.asin, "Atan": torch.atan, "Ceil": torch.ceil, "Cos": torch.cos,
    "Erf": torch.erf, "Exp": torch.exp, "Floor": torch.floor, "HardSwish": F.hardswish, "IsNaN": torch.isnan,
    "Log": torch.log, "Mish": F.mish, "Neg": torch.neg, "Not": torch.logical_not, "Reciprocal": torch.reciprocal,
    "Relu": torch.relu, "Round": torch.round, "Sigmoid": torch.sigmoid, "Sign": torch.sign, "Sin": torch.sin,
    "Softplus": F.softplus, "Softsign": F.softsign, "Sqrt": torch.sqrt, "Tan": torch.tan, "Tanh": torch.tanh,
}  # fmt: skip


def _over(a: Any, b: Any) -> Any:
    if isinstance(a, float | torch.SymFloat) or isinstance(b, float | torch.SymFloat):
        return a / b
    if type(a) is int and type(b) is int:
        return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    return a // b  # sizes are not negative


def _quotient(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    real = any(x.is_floating_point() for x in (a, b) if isinstance(x, torch.Tensor))
    return torch.div(a, b) if real else torch.div(a, b, rounding_mode="trunc")


#: ONNX's name -> what it is of tensors, and of numbers on the host
_BINARY: dict[str, tuple[Row, Row]] = {
    "Add": (torch.add, operator.add),
    "Sub": (torch.sub, operator.sub),
    "Mul": (torch.mul, operator.mul),
    "Div": (_quotient, _over),
    "Equal": (torch.eq, operator.eq),
    "Less": (torch.lt, operator.lt),
    "LessOrEqual": (torch.le, operator.le),
    "Greater": (torch.gt, operator.gt),
    "GreaterOrEqual": (torch.ge, operator.ge),
    "And": (torch.logical_and, operator.and_),
    "Or": (torch.logical_or, operator.or_),
    "Xor": (torch.logical_xor, operator.xor),
    "Pow": (lambda a, b: torch.pow(a, b).to(a.dtype), operator.pow),
}


def _root(x: Any) -> Any:
    return torch.sym_sqrt(x) if isinstance(x, torch.SymFloat | torch.SymInt) else float(x) ** 0.5


#: What an operation is of a number on the host.
_HOST: dict[Row, Row] = {
    torch.neg: operator.neg, torch.sqrt: _root, torch.reciprocal: lambda x: 1.0 / x, torch.abs: abs,
    torch.logical_not: lambda x: torch.sym_not(x) if isinstance(x, torch.SymBool) else not x,
}  # fmt: skip


def _unary(op: Row) -> Row:
    def row(x: Any) -> Any:
        host = _HOST.get(op)
        if host is not None and is_number(x):
            return host(x)
        if host is not None and isinstance(x, list) and x and all(map(is_number, x)):
            return [host(n) for n in x]
        return op(tensor(x))

    return row


def _binary(of_tensors: Row, of_numbers: Row) -> Row:
    def row(a: Any, b: Any) -> Any:
        if on_host(a) and on_host(b):
            return _each(of_numbers, a, b)
        if any(isinstance(x, torch.Tensor) and x.ndim for x in (a, b)):
            a, b = (x[0] if isinstance(x, list) and len(x) == 1 else x for x in (a, b))
        a, b = (plain(x) if is_number(x) else tensor(x) for x in (a, b))
        if not isinstance(a, torch.Tensor):
            if of_tensors in _TURNED:
                return _TURNED[of_tensors](b, a)
            a = tensor(a, b.dtype)
        return of_tensors(a, b)

    return row


#: What an operation on tensors is with its sides exchanged: a number stands on the right then.
_TURNED: dict[Row, Row] = {
    torch.add: torch.add, torch.mul: torch.mul, torch.eq: torch.eq, torch.lt: torch.gt, torch.le: torch.ge,
    torch.gt: torch.lt, torch.ge: torch.le, torch.sub: lambda b, a: torch.rsub(b, a),
}  # fmt: skip


def _each(op: Row, a: Any, b: Any) -> Any:
    """An operation on numbers and vectors of them."""
    if is_number(a) and is_number(b):
        return op(a, b)
    n = max(len(x) for x in (a, b) if isinstance(x, list))
    left, right = (x if isinstance(x, list) else [x] for x in (a, b))
    left, right = (x * n if len(x) == 1 else x for x in (left, right))
    if len(left) != len(right):
        raise Unsupported(f"of {len(left)} and {len(right)} numbers")
    return [op(x, y) for x, y in zip(left, right, strict=True)]


def _where(c: Any, a: Any, b: Any) -> Any:
    if is_number(c):
        c = bool(c)
    elif isinstance(c, list):
        c = [bool(x) for x in c]  # of sizes: what holds for the one at hand, with a guard
    if isinstance(c, bool):
        c = [c] if isinstance(a, list) or isinstance(b, list) else c
        if isinstance(c, bool) and on_host(a) and on_host(b):
            return a if c else b
    if isinstance(c, list) and on_host(a) and on_host(b):
        n = len(c)
        a, b = (x if isinstance(x, list) and len(x) == n else [x[0] if isinstance(x, list) else x] * n for x in (a, b))
        return [x if k else y for k, x, y in zip(c, a, b, strict=True)]
    c = tensor(c)
    if c.ndim:
        a, b = (x[0] if isinstance(x, list) and len(x) == 1 else x for x in (a, b))
    if is_number(a) and is_number(b):
        dtype = next((x.dtype for x in (a, b) if isinstance(x, Typed)), None)
        return torch.where(c, tensor(a, dtype), tensor(b, dtype))
    a, b = (plain(x) if is_number(x) else tensor(x) for x in (a, b))
    return torch.where(c, a, b)


def _variadic(op: Row, host: Row) -> Row:
    def row(*xs: Any) -> Any:
        if all(map(is_number, xs)):
            found = xs[0]
            for x in xs[1:]:
                found = host(found, x)
            return found
        tensors = [x for x in xs if isinstance(x, torch.Tensor)]
        dtype = tensors[0].dtype if tensors else None
        found, *rest = (tensor(x, dtype) for x in xs)
        for x in rest:
            found = op(found, x)
        return found

    return row


def _rest(a: Any, b: Any) -> Any:
    """What is left of a, with its sign."""
    return a - b * _over(a, b)


def _mod(a: Any, b: Any, *, fmod: int = 0) -> Any:
    if on_host(a) and on_host(b):
        return _each(math.fmod if fmod and type(a) is float else _rest if fmod else operator.mod, a, b)
    return (torch.fmod if fmod else torch.remainder)(tensor(a), b if is_number(b) else tensor(b))


def _clip(x: Any, low: Any = None, high: Any = None, *, min: Any = None, max: Any = None) -> Any:
    low, high = (min if low is None else low), (max if high is None else high)
    x = tensor(x)
    low, high = (y if y is None else plain(y) if is_number(y) else tensor(y) for y in (low, high))
    if any(isinstance(y, torch.Tensor) for y in (low, high)):
        low, high = (y if y is None else tensor(y, x.dtype) for y in (low, high))
    return torch.clamp(x, low, high) if low is not None or high is not None else x


def _cast(x: Any, *, to: int, saturate: int = 1) -> Any:
    dtype = DTYPES.get(to)
    if dtype is None:
        raise Unsupported(f"to the element type {to}")
    if is_number(x) and not isinstance(x, torch.SymBool):
        if dtype.is_floating_point and dtype != torch.float32 and isinstance(x, int | float):
            return Typed(x, dtype)
        if dtype.is_floating_point:
            return torch.sym_float(plain(x))
        if dtype == torch.int64 and not isinstance(x, torch.SymFloat):
            return int(x) if isinstance(x, float | bool) else x
        if dtype == torch.bool and isinstance(x, bool | int):
            return bool(x)
    if isinstance(x, list) and dtype == torch.int64 and all(isinstance(n, int | torch.SymInt) for n in x):
        return [int(n) if isinstance(n, bool) else n for n in x]
    if isinstance(x, list) and dtype == torch.float32 and x and all(map(is_number, x)):
        return [torch.sym_float(n) for n in x]
    return tensor(x).to(dtype)


def _cast_like(x: Any, y: Any, *, saturate: int = 1) -> Any:
    y = tensor(y)
    floats = isinstance(x, float) or (isinstance(x, list) and all(isinstance(n, float) for n in x))
    same = floats and y.dtype == torch.float32 and not isinstance(x, Typed)
    return x if same else tensor(x).to(y.dtype)


def _gelu(x: Any, *, approximate: str = "none") -> Any:
    return F.gelu(x, approximate=approximate)


def _swish(x: Any, *, alpha: float = 1.0) -> Any:
    return F.silu(x) if alpha == 1.0 else x * torch.sigmoid(alpha * x)


def _is_inf(x: Any, *, detect_negative: int = 1, detect_positive: int = 1) -> Any:
    if detect_negative and detect_positive:
        return torch.isinf(x)
    return torch.isposinf(x) if detect_positive else torch.isneginf(x)


ROWS: dict[str, Row] = {
    **{name: _unary(op) for name, op in _UNARY.items()},
    **{name: _binary(*ops) for name, ops in _BINARY.items()},
    "Cast": _cast,
    "CastLike": _cast_like,
    "Clip": _clip,
    "Elu": lambda x, *, alpha=1.0: F.elu(x, alpha),
    "Gelu": _gelu,
    "HardSigmoid": lambda x, *, alpha=0.2, beta=0.5: torch.clamp(alpha * x + beta, 0, 1),
    "Identity": lambda x: x,
    "IsInf": _is_inf,
    "LeakyRelu": lambda x, *, alpha=0.01: F.leaky_relu(x, alpha),
    "Max": _variadic(torch.maximum, torch.sym_max),
    "Min": _variadic(torch.minimum, torch.sym_min),
    "Mod": _mod,
    "PRelu": lambda x, slope: torch.where(x < 0, x * slope, x),
    "Sum": _variadic(torch.add, operator.add),
    "Swish": _swish,
    "Where": _where,
}
