"""Where an expression is surely above zero, or never below, whatever its loads hold; and where it is flat."""

from __future__ import annotations

from attncc.ir.attention import S
from attncc.ir.terms import ROUNDINGS, Const, Expr, Op


def sign(x: Expr) -> int:
    """2 for an expression that is surely above zero, up to what a float rounds to zero; 1 for one that is not below; 0
    for all others."""
    if _is_positive_parabola(x):
        return 2
    match x:
        case Const(value):
            return 2 if value > 0 else int(value == 0)
        case Op("exp" | "sigmoid", _):
            return 2
        case Op("abs", _):
            return 1
        case Op("pow", (_, Const(by))) if by % 2 == 0:
            return 1
        case Op(name, (a,)) if name in ROUNDINGS or name in ("log1p", "sqrt"):
            return sign(a)
        case Op("rsqrt", (a,)):
            return 2 if sign(a) == 2 else 0
        case Op("add", (a, b)):
            return max(sign(a), sign(b)) if sign(a) and sign(b) else 0
        case Op("mul", (a, b)):
            return max(sign(a), 1) if a is b else min(sign(a), sign(b))
        case Op("div", (a, b)):
            return sign(a) if sign(b) == 2 else 0
        case Op("max" | "maxfirst", (a, b)):
            return max(sign(a), sign(b))
        case Op("where", (Op("lt", (Const(low), y)), a, b)) if y is a and low >= 0:  # softplus, far from zero
            return sign(b)
        case Op("min" | "minfirst", (a, b)) | Op("where", (_, a, b)):
            return min(sign(a), sign(b))
        case _:
            return 0


def is_flat(x: Expr) -> bool:
    """Whether an expression that is never negative has no gradient where it is zero."""
    match x:
        case Op("abs", _):
            return True
        case Op("pow", (_, Const(by))):
            return by > 1
        case Op("mul", (a, b)):
            return a is b or is_flat(a) or is_flat(b)
        case Op("maxfirst", (Const(0.0), _)):
            return True
        case Op("add", (a, b)) | Op("where", (_, a, b)):
            return is_flat(a) and is_flat(b)
        case Op("div", (a, _)) | Op("log1p", (a,)):
            return is_flat(a)
        case Op(name, (a,)) if name in ROUNDINGS:
            return is_flat(a)
        case _:
            return sign(x) == 2 or (isinstance(x, Const) and x.value == 0)


def _is_positive_parabola(x: Expr) -> bool:
    """Whether an expression is c + b s + a s^2 with a > 0 and b^2 < 4 a c, as the first terms of exp(s) are."""
    found = _parabola(x)
    if found is None:
        return False
    c, b, a = found
    return a > 0 and b * b < 4 * a * c


def _parabola(x: Expr) -> tuple[float, float, float] | None:
    """(c, b, a) of c + b s + a s^2, s being the score."""
    if x is S:
        return 0.0, 1.0, 0.0
    match x:
        case Const(value):
            return float(value), 0.0, 0.0
        case Op(name, (a,)) if name in ROUNDINGS:
            return _parabola(a)
        case Op("add" | "sub" | "mul" | "div" as name, (a, b)):
            left, right = _parabola(a), _parabola(b)
            return None if left is None or right is None else _joined(name, left, right)
        case _:
            return None


def _joined(name: str, left: tuple[float, ...], right: tuple[float, ...]) -> tuple[float, float, float] | None:
    """The sum, difference, product or quotient of two such polynomials, where it is one."""
    (c, b, a), (f, e, d) = left, right
    if name in ("add", "sub"):
        sign = 1.0 if name == "add" else -1.0
        return c + sign * f, b + sign * e, a + sign * d
    if name == "div":
        return None if d or e or not f else (c / f, b / f, a / f)
    if a * e or a * d or b * d:
        return None
    return c * f, c * e + b * f, c * d + b * e + a * f
