"""Products taken apart: their factors, and a map of one element that a factor is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

from attncc.ir.build import mul
from attncc.ir.expr import ROUNDINGS, Expr, Index, Load, Op, free, loads, rewrite
from attncc.ir.linear import UNIT, X
from attncc.patterns.site import DOT


def flat(x: Expr) -> list[Expr]:
    """The factors of a product."""
    if isinstance(x, Op) and x.name == "mul":
        return [*flat(x.args[0]), *flat(x.args[1])]
    if isinstance(x, Op) and x.name in ROUNDINGS:
        return flat(x.args[0])
    return [x]


def product_of(xs: Sequence[Expr]) -> Expr:
    """The product of factors, one if there are none."""
    return reduce(mul, xs) if xs else UNIT


def mapped(x: Expr, d: Index) -> tuple[Load | None, Expr]:
    """(element, map) where an expression is a map of the one element that has the index `d`."""
    held = [y for y in loads(x) if d in free(y)]
    if len(held) != 1 or held[0].tensor.startswith(DOT):
        return None, X
    return held[0], rewrite(x, lambda y: X if y is held[0] else None)
