"""What operations make of constants, as floats of torch do: infinities and NaN where Python would raise."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

from attncc.ir.terms import Scalar


def _exp(a: float) -> float:
    try:
        return math.exp(a)
    except OverflowError:
        return math.inf


def _sigmoid(a: float) -> float:
    """Where it is exact: elsewhere the last digit is the processor's."""
    if a in (-math.inf, 0.0, math.inf):
        return {-math.inf: 0.0, 0.0: 0.5, math.inf: 1.0}[a]
    raise ValueError(a)


def _log(a: float) -> float:
    return -math.inf if a == 0 else math.log(a) if a > 0 else math.nan


def _div(a: float, b: float) -> float:
    if b:
        return a / b
    return math.nan if a == 0 or math.isnan(a) else math.copysign(math.inf, a) * math.copysign(1.0, b)


def _sqrt(a: float) -> float:
    return math.sqrt(a) if a >= 0 else math.nan


def _least(a: Scalar, b: Scalar) -> Scalar:
    return math.nan if a != a or b != b else min(a, b)


def _most(a: Scalar, b: Scalar) -> Scalar:
    return math.nan if a != a or b != b else max(a, b)


def _negate(a: float) -> float:
    return -a


def _magnitude(a: float) -> float:
    return abs(a)


def _floor_divide(a: int, b: int) -> int:
    return a // b


def _truncdiv(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _integral(f: Callable[[float], int]) -> Callable[[float], float]:
    def apply(a: float) -> float:
        return math.copysign(float(f(a)), a) if math.isfinite(a) else a

    return apply


#: What an op makes of constants. An op that is not here, or that raises, stays an op.
FOLD: dict[str, Callable[..., Scalar]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": _div,
    "floordiv": _floor_divide,
    "mod": operator.mod,
    "truncdiv": _truncdiv,
    "neg": _negate,
    "abs": _magnitude,
    "min": _least,
    "max": _most,
    "minfirst": _least,
    "maxfirst": _most,
    "lt": operator.lt,
    "le": operator.le,
    "eq": operator.eq,
    "ne": operator.ne,
    "float": float,
    "int": int,
    "exp": _exp,
    "log": _log,
    "sigmoid": _sigmoid,
    "tanh": math.tanh,
    "sqrt": _sqrt,
    "floor": _integral(math.floor),
    "ceil": _integral(math.ceil),
}
