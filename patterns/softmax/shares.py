"""Shares of a sum, as algebra over what nodes hold at a point: how a model spells them does not matter.

    top / (sum_j of[j] + exp(sink))       of: the top itself, its magnitude, or what the top is where that is above zero
    top * (1 / sum_j of[j])               = top / sum_j of[j]
    exp(x - logsumexp_j x)                = exp(x) / sum_j exp(x)
    exp(x - (m + log sum_j exp(x - m)))   = exp(x - m) / sum_j exp(x - m)

A sum that the graph holds is a load; what it sums is read at the key that it is asked for, and compared with the top.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import fx

from attncc.ir.analysis import exact, unrounded
from attncc.ir.build import ONE, ZERO, op
from attncc.ir.expr import ROUNDINGS, Const, Expr, Index, Load, Op, free, rewrite
from attncc.ir.gradients import bounded, unstopped
from attncc.patterns.site import DOT, Facts, Point, Reader, Reduction, input_at, op_name, reduction, skip_casts

#: What the weights are shares of a sum of: exponentials, themselves, or their magnitudes (of all, of those above zero).
Form = Literal["powers", "plain", "signed", "clipped"]


@dataclass(frozen=True)
class Total:
    """What `load` holds the sum of (or the logarithm of the sum of exponentials of), `more` added; at `least` that."""

    how: Reduction
    load: Load
    more: Expr | None = None
    least: float = -math.inf

    def summed(self, r: Reader, key: Expr) -> Expr:
        found = r.reduced(self.load, key)
        assert found is not None
        return unrounded(found) if self.how.op == "sum" else op("exp", found)


@dataclass(frozen=True)
class Share:
    """The element at `key` as a share of a sum, beside a logit of the row that is the `sink`; `shifted`: that has
    nothing to be taken from both it and the scores."""

    key: Expr
    form: Form
    sink: Expr | None = None
    shifted: bool = False


def fractions(r: Reader, n: fx.Node, at: Point) -> Iterator[tuple[Expr, Total]]:
    """(top, total) for each way in which a node is a quotient by a sum at a point."""
    totals = ((top, _total(r.facts, bottom)) for top, bottom in _quotients(r, n, at))
    return ((top, total) for top, total in totals if total is not None)


def share(r: Reader, top: Expr, total: Total, keys: Point) -> Share | None:
    """The share of a total that its top is along one of the indices `keys`."""
    g, at = r.gradients, r.facts.order[total.how.node]
    if g is not None and g.stopped(total.how.node, at + 1):
        return None
    outer = free(total.load, *(() if total.more is None else (total.more,)))
    single = r.facts.shape(total.how.source)[total.how.dim] is ONE
    for key in (ZERO,) if single else (x for x in keys if isinstance(x, Index) and x not in outer):
        of = total.summed(r, key)
        form = _form(top, of) or _form(_once(r, top), _once(r, of))
        if form is not None and (total.least <= -math.inf or (total.least <= 1 and _has_one(r, of, key))):
            return Share(key, form) if total.more is None else _beside(Share(key, form), exact(top), exact(total.more))
    return None


def holds_powers(f: Facts, x: Expr) -> bool:
    """Whether an expression is an exponential, scaled or masked, or a tensor of them: the mark of a softmax."""
    if isinstance(x, Op) and x.name in (*ROUNDINGS, "mul", "div", "where", "stop"):
        return any(holds_powers(f, y) for y in x.args)
    if isinstance(x, Load):
        node = f.by_name.get(x.tensor.removeprefix(DOT))
        return node is not None and op_name(node).rstrip("_") == "exp"
    return isinstance(x, Op) and x.name == "exp"


def _quotients(r: Reader, n: fx.Node, at: Point) -> Iterator[tuple[Expr, Expr]]:
    """(top, bottom) for each way in which a node is a quotient."""

    def value(x: Any) -> Expr:
        found = input_at(r, n, x, at)
        return Const(0.0) if found is None else unrounded(found)

    name = op_name(n).rstrip("_")
    tensors = [x for x in n.args[:2] if isinstance(x, fx.Node) and r.facts.is_tensor(x)]
    if name in ("div", "divide", "true_divide") and len(tensors) == 2 and not n.kwargs.get("rounding_mode"):
        yield value(n.args[0]), value(n.args[1])
    elif name in ("mul", "multiply") and len(tensors) == 2:
        for top, inverse in (tensors, tensors[::-1]):
            below = value(inverse) if op_name(skip_casts(inverse) or inverse) in ("reciprocal", "div") else None
            if isinstance(below, Op) and below.name == "div" and below.args[0] is Const(1.0):
                yield value(top), below.args[1]
    elif name == "exp":
        match value(n.args[0]):
            case Op("sub", (a, Op("add", (b, c)))):
                yield from ((op("exp", op("sub", a, x)), op("exp", unrounded(y))) for x, y in ((b, c), (c, b)))
            case Op("sub", (a, b)):
                yield op("exp", a), op("exp", unrounded(b))
            case _:
                return


def _total(f: Facts, x: Expr) -> Total | None:
    """The sum that a denominator is, or is made of."""
    match unrounded(x):
        case Op("exp", (Op("log", (a,)),)):
            return _total(f, a)
        case Op("exp", (Load() as load,)) | (Load() as load):
            how = reduction(f, f.by_name.get(load.tensor.removeprefix(DOT)))
            found = how is not None and how.op == ("logsumexp" if isinstance(unrounded(x), Op) else "sum")
            return Total(how, load) if how is not None and found else None
        case Op("add", (a, b)):
            totals = ((_total(f, y), z) for y, z in ((a, b), (b, a)))
            return next((replace(t, more=z) for t, z in totals if t is not None and t.more is None), None)
        case Op("max" | "maxfirst", (a, b)):
            totals = ((_total(f, y), z) for y, z in ((a, b), (b, a)) if isinstance(z, Const))
            return next((replace(t, least=float(z.value)) for t, z in totals if t is not None), None)
        case _:
            return None


def _form(top: Expr, of: Expr) -> Form | None:
    top = unrounded(top)
    if top is of:
        return "powers" if isinstance(of, Op) and of.name == "exp" else "plain"
    inner = unrounded(of.args[0]) if isinstance(of, Op) and of.name == "abs" else None
    clipped = bounded(top)
    if inner is top:
        return "signed"
    above = clipped is not None and clipped[0] == "max" and clipped[2].value == 0 and unrounded(clipped[1]) is inner
    return "clipped" if above else None


def _once(r: Reader, x: Expr) -> Expr:
    """An expression in which reductions of the same are one load, however often the graph computes them."""

    def rule(y: Expr) -> Expr | None:
        of = r.reduced(y, Index("key"))
        how = None if of is None or not isinstance(y, Load) else reduction(r.facts, r.facts.by_name.get(y.tensor))
        return None if of is None or how is None else r.facts.shared.setdefault((how.op, _once(r, of)), y)

    return rewrite(x, rule)


def _has_one(r: Reader, of: Expr, key: Expr) -> bool:
    """Whether the largest of what is summed is 1, as that of exponentials less their maximum is."""
    match exact(of):
        case Op("exp", (Op("sub", (x, highest)),)):
            inner = r.reduced(unstopped(highest), key, "max")
            return inner is not None and exact(inner) is x
        case _:
            return False


def _beside(x: Share, top: Expr, more: Expr) -> Share | None:
    """A share with the logarithm of what its sum has beside what it sums as the sink, both less the same where that
    cancels."""
    match top, more:
        case Op("exp", (Op("sub", (_, m)),)), Op("exp", (Op("sub", (a, n)),)) if unstopped(m) is unstopped(n):
            return replace(x, sink=a)
        case Op("exp", (Op("sub", (_, m)),)), Op("exp", (Op("neg", (n,)),)) if unstopped(m) is unstopped(n):
            return replace(x, sink=Const(0.0))
        case _, Op("exp", (a,)):
            return replace(x, sink=a, shifted=True)
        case _, Const(value) if value > 0:
            return replace(x, sink=Const(math.log(value)), shifted=True)
        case _:
            return None
