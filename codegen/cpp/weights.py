"""What the weight expression needs: nothing, a factor a key, or the finished sum of the row."""

from __future__ import annotations

from attncc.ir import Const, Expr, Op, W
from attncc.ir.attention import S
from attncc.ir.build import mul, op, where
from attncc.ir.expr import ROUNDINGS, free, walk


def linear_factor(x: Expr) -> Expr | None:
    """f with x = w * f, where f mentions neither w nor s; None where there is none.

    A weight that is linear in w commutes with the division by the row's sum, so it needs no second pass."""
    if x is W:
        return Const(1.0)
    if not isinstance(x, Op):
        return None
    if x.name in ROUNDINGS:
        return linear_factor(x.args[0])
    if x.name == "neg" and (f := linear_factor(x.args[0])) is not None:
        return op("neg", f)
    if x.name in ("mul", "div"):
        a, b = x.args
        if _known(b) and (f := linear_factor(a)) is not None:
            return mul(f, b) if x.name == "mul" else op("div", f, b)
        if x.name == "mul" and _known(a) and (f := linear_factor(b)) is not None:
            return mul(a, f)
    if x.name == "where" and _known(x.args[0]):
        f, g = (Const(0.0) if y == Const(0.0) else linear_factor(y) for y in x.args[1:])
        if f is not None and g is not None:
            return where(x.args[0], f, g)
    return None


def vanishes(x: Expr) -> bool:
    """Whether x is 0 wherever w is 0 (other factors being finite)."""
    if x is W or x == Const(0.0):
        return True
    if not isinstance(x, Op):
        return False
    if x.name in (*ROUNDINGS, "neg", "abs", "sqrt"):
        return vanishes(x.args[0])
    if x.name == "mul":
        return vanishes(x.args[0]) or vanishes(x.args[1])
    if x.name == "div":
        return vanishes(x.args[0])
    if x.name in ("where", "add", "sub", "min", "max"):
        return all(vanishes(y) for y in x.args[-2:])
    return False


def selects(x: Expr) -> bool:
    """Whether x may be something else than NaN where w is NaN."""
    return any(isinstance(y, Op) and y.name in ("where", "min", "max", "isnan") for y in walk(x))


def _known(x: Expr) -> bool:
    return not free(x) & {W, S}
