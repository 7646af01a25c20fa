"""Weights that are shares of a sum, as the softmax that they are: f / sum f is a softmax of log f.

    base^x / sum base^x                 softmax(x ln base)
    f(s) / (sum f(s) + c)               softmax(log f(s)) beside a sink of log c, for f >= 0
    s / (sum |s| + c)                   the softmax of log |s|, with the sign of s
    relu(s) / (sum |s| + c)             the same where s is above zero, and zero elsewhere

A row whose weights are all zero is 0 / 0 without c, which no softmax is: f must be positive then.
"""

from __future__ import annotations

from torch import fx

from attncc.ir.attention import S, W
from attncc.ir.build import NEG_INF, add, const, gt, lt, maximum, mul, op, where
from attncc.ir.expr import ROUNDINGS, Const, Expr, Op, free, rewrite
from attncc.ir.gradients import bounded
from attncc.ir.reasons import because
from attncc.patterns.site import Unreadable, log_sigmoid
from attncc.patterns.softmax.anchors import Anchor
from attncc.patterns.softmax.shares import bare

_TINY, _LOW = 1e-37, -1e30


def as_softmax(anchor: Anchor, score: Expr, weight: Expr, *, wants_grad: bool = False) -> tuple[Expr, Expr]:
    """The score and the weight of the softmax that an anchor's shares of a sum are.

    Raises Unreadable where gradients are `wants_grad` and would be lost in a logarithm of zero."""
    if anchor.form in ("scores", "powers"):
        return score, weight
    zero = anchor.sink is not None
    if anchor.form in ("signed", "clipped"):
        clipped = bounded(bare(score)) if anchor.form == "clipped" else None
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

    match x:
        case Op(name, (a,)) if name in ROUNDINGS:
            return log(a)
        case Op("exp", (a,)):
            return a
        case Op("sigmoid", (Op("where", (c, a, hidden)),)) if hidden is NEG_INF and S not in free(c):
            return where(c, log_sigmoid(a), NEG_INF)
        case Op("max", (Op("where", (c, a, hidden)), Const(0.0) as low)) if hidden is NEG_INF and S not in free(c):
            return where(c, log(maximum(a, low)), NEG_INF)
        case Op("maxfirst", (Const(0.0) as low, Op("where", (c, a, hidden)))) if hidden is NEG_INF and S not in free(c):
            return where(c, log(op("maxfirst", low, a)), NEG_INF)
        case Op("sigmoid", (a,)):
            return log_sigmoid(a)
        case Op("where", (c, a, b)) if S not in free(c) and (_is_zero(a) or _is_zero(b)):
            return where(c, *(NEG_INF if _is_zero(y) else log(y) for y in (a, b)))
        case Op("mul", (a, Op("where", (c, Const(1.0), Const(0.0))))) if S not in free(c):
            return where(c, log(a), NEG_INF)
        case Op("mul", (a, b)) if a is b:
            return mul(log(a if _sign(a) == 2 else op("abs", a), wants_grad=False), const(2.0))
        case Op("mul", (a, b)) if 2 in (_sign(a), _sign(b)):
            return add(log(a), log(b))
        case _:
            pass
    if _sign(x) == 2:
        return op("log", x)
    if not _sign(x):
        raise Unreadable(at, because("may-be-negative"))
    if not zero:
        raise Unreadable(at, because("sum-may-be-zero"))
    if wants_grad and not _is_flat(x):
        raise Unreadable(at, because("gradient-at-zero"))
    return where(gt(x, const(0.0)), op("log", maximum(x, const(_TINY))), const(_LOW))


def _is_zero(x: Expr) -> bool:
    return isinstance(x, Const) and x.value == 0


def _sign(x: Expr) -> int:
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
            return _sign(a)
        case Op("rsqrt", (a,)):
            return 2 if _sign(a) == 2 else 0
        case Op("add", (a, b)):
            return max(_sign(a), _sign(b)) if _sign(a) and _sign(b) else 0
        case Op("mul", (a, b)):
            return max(_sign(a), 1) if a is b else min(_sign(a), _sign(b))
        case Op("div", (a, b)):
            return _sign(a) if _sign(b) == 2 else 0
        case Op("max" | "maxfirst", (a, b)):
            return max(_sign(a), _sign(b))
        case Op("where", (Op("lt", (Const(low), y)), a, b)) if y is a and low >= 0:  # softplus, far from zero
            return _sign(b)
        case Op("min" | "minfirst", (a, b)) | Op("where", (_, a, b)):
            return min(_sign(a), _sign(b))
        case _:
            return 0


def _is_flat(x: Expr) -> bool:
    """Whether an expression that is never negative has no gradient where it is zero."""
    match x:
        case Op("abs", _):
            return True
        case Op("pow", (_, Const(by))):
            return by > 1
        case Op("mul", (a, b)):
            return a is b or _is_flat(a) or _is_flat(b)
        case Op("maxfirst", (Const(0.0), _)):
            return True
        case Op("add", (a, b)) | Op("where", (_, a, b)):
            return _is_flat(a) and _is_flat(b)
        case Op("div", (a, _)) | Op("log1p", (a,)):
            return _is_flat(a)
        case Op(name, (a,)) if name in ROUNDINGS:
            return _is_flat(a)
        case _:
            return _sign(x) == 2 or _is_zero(x)


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
