"""Cheaper spellings of float expressions, each within a rounding or two of what was written."""

from __future__ import annotations

from attncc.ir import Const, Expr, Op
from attncc.ir.build import mul, op

_HUGE = 1e30


def folded(x: Expr, seen: dict[Expr, Expr] | None = None) -> Expr:
    """`x` with divisions by constants as products, and constant factors of a product as one.

    Conditions and indices are left as they are: there a rounding could change which branch or element is taken."""
    seen = {} if seen is None else seen
    if not isinstance(x, Op) or x.kind != "float":
        return x
    if x not in seen:
        args = [folded(a, seen) for a in x.args]
        factor = _factor(x.name, args)
        seen[x] = op(x.name, *args) if factor is None else _scaled(*factor)
    return seen[x]


def _factor(name: str, args: list[Expr]) -> tuple[Expr, float] | None:
    """(y, c) where the operation is y * c."""
    if name == "mul":
        for y, c in (args, args[::-1]):
            if isinstance(c, Const):
                return y, float(c.value)
    if name == "div" and isinstance(c := args[1], Const) and 1 / _HUGE < abs(float(c.value)) < _HUGE:
        return args[0], 1 / float(c.value)
    return None


def _scaled(y: Expr, by: float) -> Expr:
    if isinstance(y, Op) and y.name == "mul":
        for z, c in (y.args, y.args[::-1]):
            if isinstance(c, Const) and 1 / _HUGE < abs(float(c.value) * by) < _HUGE:
                return mul(z, Const(float(c.value) * by))
    return mul(y, Const(by))
