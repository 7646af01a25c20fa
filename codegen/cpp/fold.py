"""Cheaper spellings of float expressions, each within a rounding or two of what was written."""

from __future__ import annotations

import math
from collections.abc import Callable

from attncc.ir import Const, Expr, Load, Op, S
from attncc.ir.build import mul, op, where
from attncc.ir.expr import walk

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


def spread(x: Expr, by: float, apart: Callable[[Expr], bool], most: float) -> Expr | None:
    """x * by, the factor taken into terms where it costs nothing: constants, the score, and what is `apart`, computed
    outside the loop over keys and rows. None where some term would need a product of its own.

    What is apart and may be huge stays within `most`, the largest finite number, unless it is infinite."""

    def inside(x: Expr) -> Expr | None:
        if apart(x):
            return _within(mul(x, Const(by)), x, most) if may_be_huge(x) else mul(x, Const(by))
        if x is S:
            return mul(x, Const(by))
        if not isinstance(x, Op):
            return None
        if x.name == "mul" and any(isinstance(a, Const) for a in x.args):
            return _scaled(x, by)
        if x.name in ("add", "sub", "neg"):
            args = [inside(a) for a in x.args]
            return op(x.name, *(a for a in args if a is not None)) if None not in args else None
        return None

    return inside(x)


def _within(x: Expr, original: Expr, most: float) -> Expr:
    limited = op("max", op("min", x, Const(most)), Const(-most))
    return where(op("eq", op("abs", original), Const(math.inf)), original, limited)


def may_be_huge(x: Expr) -> bool:
    """Whether `x` can reach numbers that stand for minus infinity: it loads floats, or names one."""
    return any(
        (isinstance(n, Load) and n.kind == "float") or (isinstance(n, Const) and abs(float(n.value)) > _HUGE)
        for n in walk(x)
    )
