"""What kernels ask of an attention's expressions: the scale of the score, the factor of the weight, conjuncts."""

from __future__ import annotations

import math

from attncc.ir import Const, Expr, Op, W
from attncc.ir.affine import expr as from_poly
from attncc.ir.affine import poly
from attncc.ir.build import and_, const, mul, op, sub, where
from attncc.ir.expr import ROUNDINGS, free


def scaled(score: Expr) -> tuple[Expr, float]:
    """`(x, c)` with score = x * c and c > 0, so that the largest score is c times the largest x: the scale is then
    applied inside the exponential, where it is free."""
    factor = 1.0
    while isinstance(score, Op):
        if score.name in ROUNDINGS:
            score = score.args[0]
            continue
        step = _constant_factor(score)
        if step is None or not 1e-30 < factor * step[1] < 1e30:
            break
        score, factor = step[0], factor * step[1]
    return score, factor


def _constant_factor(x: Op) -> tuple[Expr, float] | None:
    match x:
        case Op("mul", (a, Const(c))) | Op("mul", (Const(c), a)) if 0 < c < math.inf:
            return a, float(c)
        case Op("div", (a, Const(c))) if 0 < c < math.inf:
            return a, 1.0 / float(c)
        case _:
            return None


ONE = const(1.0)


def weight_factor(weight: Expr) -> Expr | None:
    """`f` with weight = w * f for every w, where the weight is linear in w; else None.

    Such a weight is applied to the unnormalised weights, so that one pass over the keys is enough."""
    if weight is W:
        return ONE
    if not isinstance(weight, Op) or W not in free(weight):
        return weight if isinstance(weight, Const) and weight.value == 0 else None
    match weight:
        case Op(name, (a,)) if name in ROUNDINGS:
            return weight_factor(a)
        case Op("neg", (a,)):
            factor = weight_factor(a)
            return None if factor is None else mul(factor, const(-1.0))
        case Op("mul", (a, b)) if (W in free(a)) != (W in free(b)):
            linear, rest = (a, b) if W in free(a) else (b, a)
            factor = weight_factor(linear)
            return None if factor is None else mul(factor, rest)
        case Op("div", (a, b)) if W not in free(b):
            factor = weight_factor(a)
            return None if factor is None else op("div", factor, b)
        case Op("where", (c, a, b)) if W not in free(c):
            yes, no = weight_factor(a), weight_factor(b)
            return None if yes is None or no is None else where(c, yes, no)
        case _:
            return None


def keeps_zero(weight: Expr) -> bool:
    """Whether weight(0) = 0 by its structure, so that a key of weight zero adds nothing."""
    if weight is W:
        return True
    match weight:
        case Const(value):
            return value == 0
        case Op("mul", (a, b)):
            return keeps_zero(a) or keeps_zero(b)
        case Op("add" | "sub" | "min" | "max", (a, b)):
            return keeps_zero(a) and keeps_zero(b)
        case Op("where", (_, a, b)):
            return keeps_zero(a) and keeps_zero(b)
        case Op("div", (a, _)):
            return keeps_zero(a)
        case Op(name, (a,)) if name in (*ROUNDINGS, "neg", "abs", "sqrt", "tanh", "erf", "floor", "ceil", "round"):
            return keeps_zero(a)
        case _:
            return False


def conjuncts(mask: Expr) -> tuple[Expr, ...]:
    if isinstance(mask, Op) and mask.name == "and":
        return conjuncts(mask.args[0]) + conjuncts(mask.args[1])
    return (mask,)


def only(mask: Expr, banned: frozenset[Expr]) -> Expr:
    """The conjuncts of a mask that mention none of `banned`."""
    return and_(*(c for c in conjuncts(mask) if not free(c) & banned))


def comparison_sides(x: Expr, j: Expr, rows: frozenset[Expr]) -> tuple[str, Expr, Expr] | None:
    """(relation, row, key) with `x` = row le, eq or ne key, for a comparison of integers whose terms each mention the
    rows or the key `j`, not both."""
    if not isinstance(x, Op) or x.name not in ("lt", "le", "eq", "ne") or x.args[0].kind != "int":
        return None
    row: dict[tuple[Expr, ...], int] = {}
    key: dict[tuple[Expr, ...], int] = {}
    slack = sub(x.args[1], x.args[0])
    for m, c in poly(sub(slack, const(1)) if x.name == "lt" else slack).items():
        leaves = frozenset[Expr]().union(*(free(f) for f in m))
        if j in leaves and leaves & rows:
            return None
        if j in leaves:
            key[m] = c
        else:
            row[m] = -c
    return ("le" if x.name == "lt" else x.name), from_poly(row), from_poly(key)
