"""Derivatives of float expressions, a rule for each operation.

    d(x + y) = dx + dy        d(x * y) = dx y + x dy        d tanh(x) = dx (1 - tanh(x)^2)        d stop(x) = 0

What torch's autograd does at ties and kinks is done here: `min` and `max` give half to each side of a tie, `minfirst`
and `maxfirst` all to the first, `abs` nothing at zero, and a rounding passes on what it gets.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from attncc.ir.build import add, const, lt, mul, op, sub, where
from attncc.ir.terms import ROUNDINGS, Const, Expr, Op, walk

_ONE, _ZERO, _HALF = const(1.0), const(0.0), const(0.5)


class NotDifferentiable(ValueError):
    """An operation without a rule; the message names it."""


def derivative(x: Expr, leaf: Expr) -> Expr | None:
    """d x / d leaf, a leaf being a variable or a load; None where it is zero everywhere.

    Raises NotDifferentiable."""
    known: dict[Expr, Expr | None] = {leaf: _ONE}
    for n in walk(x):
        if n not in known:
            known[n] = _of_op(n, known) if isinstance(n, Op) and n.kind == "float" else None
    return known[x]


#: The derivative of an operation of one float: from its argument, its own value, and what flows in.
_UNARY: dict[str, Callable[[Expr, Expr, Expr], Expr]] = {
    "neg": lambda a, y, da: op("neg", da),
    "abs": lambda a, y, da: where(lt(a, _ZERO), op("neg", da), where(lt(_ZERO, a), da, _ZERO)),
    "exp": lambda a, y, da: mul(y, da),
    "log": lambda a, y, da: op("div", da, a),
    "log1p": lambda a, y, da: op("div", da, add(_ONE, a)),
    "tanh": lambda a, y, da: mul(sub(_ONE, mul(y, y)), da),
    "sigmoid": lambda a, y, da: mul(mul(y, sub(_ONE, y)), da),
    "sqrt": lambda a, y, da: op("div", mul(_HALF, da), y),
    "rsqrt": lambda a, y, da: mul(const(-0.5), mul(mul(y, mul(y, y)), da)),
    "erf": lambda a, y, da: mul(mul(const(2 / math.sqrt(math.pi)), op("exp", op("neg", mul(a, a)))), da),
    "sin": lambda a, y, da: mul(op("cos", a), da),
    "cos": lambda a, y, da: op("neg", mul(op("sin", a), da)),
}
#: Operations that no gradient passes: steps, and what says so.
_FLAT = frozenset({"floor", "ceil", "round", "stop", "float"})


def _of_op(x: Op, known: dict[Expr, Expr | None]) -> Expr | None:
    parts = [known.get(a) for a in x.args]
    if x.name in _FLAT or all(p is None for p in parts):
        return None
    if x.name in ROUNDINGS:
        return parts[0]
    if x.name in _UNARY and parts[0] is not None:
        return _UNARY[x.name](x.args[0], x, parts[0])
    match x:
        case Op("add", _):
            return _sum(*parts)
        case Op("sub", _):
            return _sum(parts[0], None if parts[1] is None else op("neg", parts[1]))
        case Op("mul", (a, b)):
            return _sum(_times(parts[0], b), _times(parts[1], a))
        case Op("div", (a, b)):
            over = None if parts[1] is None else op("neg", op("div", mul(x, parts[1]), b))
            return _sum(None if parts[0] is None else op("div", parts[0], b), over)
        case Op("pow", (a, Const(power))) if parts[0] is not None:
            if power == 0:
                return None
            return mul(mul(const(float(power)), op("pow", a, const(float(power) - 1.0))), parts[0])
        case Op("where", (c, _, _)):
            return where(c, _or_zero(parts[1]), _or_zero(parts[2]))
        case Op("min" | "max" | "minfirst" | "maxfirst" as name, (a, b)):
            first, second = _or_zero(parts[0]), _or_zero(parts[1])
            low, high = (a, b) if name.startswith("min") else (b, a)
            if name.endswith("first"):
                return where(lt(b, a) if low is a else lt(a, b), second, first)
            return where(lt(low, high), first, where(lt(high, low), second, mul(_HALF, add(first, second))))
        case _:
            raise NotDifferentiable(f"{x.name} has no derivative here")


def _or_zero(x: Expr | None) -> Expr:
    return _ZERO if x is None else x


def _sum(x: Expr | None, y: Expr | None) -> Expr | None:
    return y if x is None else x if y is None else add(x, y)


def _times(x: Expr | None, y: Expr) -> Expr | None:
    return None if x is None else mul(x, y)
