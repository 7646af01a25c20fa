"""Attentions that the operators of libraries compute: scaled scores, capped or not, a bias, a mask.

    softmax(cap * tanh(scale / cap * s) + bias where mask) v,    softmax(scale * s + bias where mask) v
"""

from __future__ import annotations

from dataclasses import dataclass

from attncc.ir.analysis import scaled
from attncc.ir.attention import Attention, S, W
from attncc.ir.build import TRUE, add, const, op
from attncc.ir.expr import Const, Expr, Op, mentions, substitute


@dataclass(frozen=True)
class Dense:
    """The parts of such an attention. `cap` is 0 where scores are not capped. `causal` says that the mask is j <= i.
    `settled`: rows that see nothing do not occur, or give zero under a boolean mask; elsewhere `empty` says what they
    give."""

    scale: float
    cap: float
    bias: Expr | None
    mask: Expr
    causal: bool
    settled: bool


def dense(a: Attention) -> Dense | None:
    """The parts of `a`, None where it has others: another normalizer, a sink, other scores, weights that are changed,
    tensors of several dtypes."""
    dtypes = {a.tensor(x.tensor).dtype for x in (a.q, a.k, a.v)} | {a.dtype}
    if a.normalizer != "softmax" or a.sink is not None or a.weight is not W or a.outputs != ("out",) or len(dtypes) > 1:
        return None
    terms = _terms(a.score)
    own = [x for x in terms if mentions(x, S)]
    if len(own) != 1:
        return None
    found = _capped(own[0])
    if found is None:
        return None
    bias: Expr | None = None
    for x in terms:
        if x is not own[0]:
            bias = x if bias is None else add(bias, x)
    causal = a.mask is _causal(a)
    settled = sees_a_key(a) or (a.empty == "zero" and bias is None)
    return Dense(*found, bias, a.mask, causal, settled)


def _capped(x: Expr) -> tuple[float, float] | None:
    """(scale, cap) of a score."""
    inner, factor = scaled(x)
    if inner is S:
        return factor, 0.0
    if isinstance(inner, Op) and inner.name == "tanh" and factor > 0:
        argument, scale = scaled(inner.args[0])
        if argument is S:
            return scale * factor, factor
    return None


def _causal(a: Attention) -> Expr:
    return Op("le", (a.j.index, a.i.index))


def sees_a_key(a: Attention) -> bool:
    """Whether each row sees a key for certain: its own, the first one, or any."""
    own = a.i.extent == a.j.extent and substitute(a.mask, {a.j.index: a.i.index}) is TRUE
    first = substitute(a.mask, {a.j.index: const(0)}) is TRUE
    return a.mask is TRUE or own or first or a.mask is _causal(a)


def _terms(x: Expr) -> tuple[Expr, ...]:
    """The terms of a sum, left to right."""
    match x:
        case Op("add", (left, right)):
            return (*_terms(left), *_terms(right))
        case Op("sub", (left, right)):
            return (*_terms(left), *(op("neg", t) for t in _terms(right)))
        case Op("mul" | "div", (Op("add" | "sub") as left, Const() as right)):
            return tuple(op(x.name, t, right) for t in _terms(left))
        case _:
            return (x,)
