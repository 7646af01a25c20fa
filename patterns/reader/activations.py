"""Functions of one number that the IR has no operation for, in those that it has; as torch defines them.

So are their gradients, at a bend too: `minfirst` and `maxfirst` say which side a tie belongs to."""

from __future__ import annotations

import math

from attncc.ir.build import add, const, gt, le, lt, minimum, mul, op, sub, where
from attncc.ir.expr import Expr, Op
from attncc.ir.gradients import bounded


def _times(x: Expr, by: float) -> Expr:
    return mul(x, const(float(by)))


def square(x: Expr) -> Expr:
    """x * x; what a root was taken of, as what it was."""
    inner = x.args[0] if isinstance(x, Op) and x.name == "sqrt" else None
    found = None if inner is None else bounded(inner)
    if inner is not None and found is not None and found[0] == "max" and found[2].value >= 0:
        return inner
    return mul(x, x)


def clipped(x: Expr, low: float, high: float) -> Expr:
    """`hardtanh`, whose gradient is zero on both ends."""
    return op("minfirst", const(float(high)), op("maxfirst", const(float(low)), x))


def relu6(x: Expr) -> Expr:
    return clipped(x, 0.0, 6.0)


def exp2(x: Expr) -> Expr:
    return power_of(2.0, x)


def power_of(base: float, x: Expr) -> Expr:
    """base ** x, for a base above zero."""
    if base == 1.0:  # of infinity and NaN too
        return const(1.0)
    return op("exp", _times(x, math.log(base)))


def logarithm(base: float, x: Expr) -> Expr:
    return _times(op("log", x), 1.0 / math.log(base))


def elu(x: Expr, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Expr:
    below = _times(sub(op("exp", _times(x, input_scale)), const(1.0)), alpha)
    return _times(where(gt(x, const(0.0)), x, below), scale)


def celu(x: Expr, alpha: float = 1.0) -> Expr:
    return elu(x, alpha, 1.0, 1.0 / alpha)


def selu(x: Expr) -> Expr:
    """Klambauer et al., 2017: arXiv 1706.02515."""
    return elu(x, 1.6732632423543772848170429916717, 1.0507009873554804934193349852946)


def leaky_relu(x: Expr, slope: float = 0.01) -> Expr:
    return where(gt(x, const(0.0)), x, _times(x, slope))


def silu(x: Expr) -> Expr:
    return mul(x, op("sigmoid", x))


def softplus(x: Expr, beta: float = 1.0, threshold: float = 20.0) -> Expr:
    scaled = _times(x, beta)
    curve = _times(op("log1p", op("exp", op("minfirst", scaled, const(float(threshold))))), 1.0 / beta)
    return where(gt(scaled, const(float(threshold))), x, curve)


def log_sigmoid(x: Expr) -> Expr:
    return sub(minimum(x, const(0.0)), op("log1p", op("exp", op("neg", op("abs", x)))))


def mish(x: Expr) -> Expr:
    return mul(x, op("tanh", softplus(x)))


def gelu(x: Expr, approximate: str = "none") -> Expr:
    if approximate == "tanh":
        inner = _times(add(x, _times(mul(mul(x, x), x), 0.044715)), math.sqrt(2.0 / math.pi))
        return mul(_times(x, 0.5), add(const(1.0), op("tanh", inner)))
    return mul(_times(x, 0.5), add(const(1.0), op("erf", _times(x, math.sqrt(0.5)))))


def hardsigmoid(x: Expr) -> Expr:
    return _times(clipped(add(x, const(3.0)), 0.0, 6.0), 1.0 / 6.0)


def hardswish(x: Expr) -> Expr:
    return mul(x, hardsigmoid(x))


def threshold(x: Expr, limit: float, value: float) -> Expr:
    return where(le(x, const(float(limit))), const(float(value)), x)  # NaN stays


def sign(x: Expr) -> Expr:
    if x.kind == "bool":
        return x
    zero, one = (const(0.0), const(1.0)) if x.kind == "float" else (const(0), const(1))
    return where(gt(x, zero), one, where(lt(x, zero), op("neg", one), zero))


def trunc(x: Expr) -> Expr:
    return where(lt(x, const(0.0)), op("ceil", x), op("floor", x))
