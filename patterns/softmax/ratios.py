"""Weights that are shares of a sum, as the softmax that they are: f / sum f is a softmax of log f.

    base^x / sum base^x                 softmax(x ln base)
    f(s) / (sum f(s) + c)               softmax(log f(s)) beside a sink of log c, for f >= 0
    s / (sum |s| + c)                   the softmax of log |s|, with the sign of s
    relu(s) / (sum |s| + c)             the same where s is above zero, and zero elsewhere

A row whose weights are all zero is 0 / 0 without c, which no softmax is: f must be positive then.
"""

from __future__ import annotations

from typing import TypeGuard

from torch import fx

from attncc.ir.analysis import unrounded, zero_unless
from attncc.ir.attention import S, W
from attncc.ir.build import NEG_INF, add, const, gt, lt, maximum, mul, op, where
from attncc.ir.expr import ROUNDINGS, Expr, Op, free, rewrite
from attncc.ir.gradients import bounded
from attncc.ir.reasons import because
from attncc.ir.signs import is_flat, sign
from attncc.patterns.site import Unreadable, log_sigmoid
from attncc.patterns.softmax.anchors import Anchor

_TINY, _LOW = 1e-37, -1e30


def as_softmax(anchor: Anchor, score: Expr, weight: Expr, *, wants_grad: bool = False) -> tuple[Expr, Expr]:
    """The score and the weight of the softmax that an anchor's shares of a sum are.

    Raises Unreadable where gradients are `wants_grad` and would be lost in a logarithm of zero."""
    if anchor.form in ("scores", "powers"):
        return score, weight
    zero = anchor.sink is not None
    if anchor.form in ("signed", "clipped"):
        clipped = bounded(unrounded(score)) if anchor.form == "clipped" else None
        score, below = (score, op("neg", W)) if clipped is None else (clipped[1], const(0.0))
        signed = where(lt(score, const(0.0)), below, W)
        weight = rewrite(weight, lambda x: signed if x is W else None)
        score = op("abs", score)
        if wants_grad and anchor.form == "signed":
            raise Unreadable(anchor.node, because("gradient-at-zero"))
    return _log(score, anchor.node, zero=zero, wants_grad=wants_grad), weight


def _log(x: Expr, at: fx.Node, *, zero: bool, wants_grad: bool) -> Expr:
    """The logarithm of a weight, -inf where a mask makes it zero. `zero`: whether it may be zero elsewhere too."""

    def log(x: Expr, wants_grad: bool = wants_grad) -> Expr:
        return _log(x, at, zero=zero, wants_grad=wants_grad)

    kept = zero_unless(x, products=True)
    if kept is not None and S not in free(kept[0]):
        return where(kept[0], log(kept[1]), NEG_INF)
    match x:
        case Op(name, (a,)) if name in ROUNDINGS:
            return log(a)
        case Op("exp", (a,)):
            return a
        case Op("sigmoid" | "max" | "maxfirst") if any(map(_is_hidden, x.args)):  # f(c ? a : -inf) = c ? f(a) : 0
            (hidden,) = filter(_is_hidden, x.args)
            c, *chosen = hidden.children
            return log(where(c, *(op(x.name, *(y if z is hidden else z for z in x.args)) for y in chosen)))
        case Op("sigmoid", (a,)):
            return log_sigmoid(a)
        case Op("mul", (a, b)) if a is b:
            return mul(log(a if sign(a) == 2 else op("abs", a), wants_grad=False), const(2.0))
        case Op("mul", (a, b)) if 2 in (sign(a), sign(b)):
            return add(log(a), log(b))
        case _:
            pass
    if sign(x) == 2:
        return op("log", x)
    if not sign(x):
        raise Unreadable(at, because("may-be-negative"))
    if not zero:
        raise Unreadable(at, because("sum-may-be-zero"))
    if wants_grad and not is_flat(x):
        raise Unreadable(at, because("gradient-at-zero"))
    return where(gt(x, const(0.0)), op("log", maximum(x, const(_TINY))), const(_LOW))


def _is_hidden(x: Expr) -> TypeGuard[Op]:
    """Whether an expression is -inf where a mask hides keys."""
    return isinstance(x, Op) and x.name == "where" and x.args[2] is NEG_INF and S not in free(x.args[0])
