"""Anchors: the places where a graph normalises scores, however it is spelled."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import fx

from attncc.ir.attention import Empty, Normalizer
from attncc.patterns.site import (
    CASTS,
    EXPS,
    MAXES,
    SUMS,
    Facts,
    alike,
    argument,
    compares,
    exponent,
    is_maximum,
    one_dim,
    reduction,
    scattered,
    skip_casts,
    tensor,
    written,
)

aten = torch.ops.aten
_LSES = (aten.logsumexp.default, aten.special_logsumexp.default)
_LOGS = (aten.log_softmax.int, aten._log_softmax.default, aten.special_log_softmax.default)
_SUBS = (aten.sub.Tensor, aten.sub_.Tensor)
_ADDS = (aten.add.Tensor, aten.add_.Tensor)
_CLAMPS = (aten.clamp.default, aten.clamp_min.default, aten.clamp_.default)
_LARGER = (aten.maximum.default, aten.max.other)
_RELUS = (aten.relu.default, aten.relu_.default)
DIVISIONS = (aten.div.Tensor, aten.div_.Tensor)
#: What keeps a denominator away from zero.
_BOUNDED = (*_ADDS, *_CLAMPS)
_SCALINGS = (aten.mul.Tensor, aten.mul_.Tensor, *DIVISIONS, aten.where.self, aten.masked_fill.Scalar,
             aten.masked_fill_.Scalar)  # fmt: skip


@dataclass(frozen=True)
class Anchor:
    """`node` holds the normalised weights of `scores` along `dim`, as `reader` (if not `node` itself) sees them.
    `invariant` are nodes that are constant along `dim` and cancel in the quotient (a row maximum). `empty` overrides
    what a row of all -inf gives. `sink` is the logit of what the denominator has beside the exponentials, a number or
    the node that holds it for each row. `shares` says what the weights are shares of a sum of: powers of a `base`
    (None: the natural one) with the scores as exponents, the scores themselves, or these (all, or those above zero)
    with the sum taken of their magnitudes."""

    node: fx.Node
    scores: fx.Node
    dim: int
    normalizer: Normalizer = "softmax"
    empty: Empty | None = None
    invariant: frozenset[fx.Node] = frozenset()
    reader: fx.Node | None = None
    sink: float | fx.Node | None = None
    ratio: Literal["powers", "plain", "signed", "clipped"] = "powers"
    base: float | None = None

    def read_at(self, f: Facts) -> int:
        """The position at which the scores are read: a later write to them changes nothing."""
        return f.order[self.reader or self.node]


def find_anchors(f: Facts) -> list[Anchor]:
    """Every normaliser of the graph, in order. A softmax spelled in several ops gives its last one."""
    found: list[Anchor] = []
    inner: set[fx.Node] = set()
    for n in f.graph.nodes:
        rule = _RULES.get(n.target) if n.op == "call_function" else None
        anchor = None if rule is None else rule(f, n)
        if anchor is not None and f.rank(anchor.scores) > 0 and f.value(anchor.scores).is_floating_point():
            if stopped_inside(f, anchor) is None:
                found.append(without_maximum(f, anchor))
            inner |= _between(anchor)
    return [a for a in found if a.node not in inner]


def near_misses(f: Facts) -> list[fx.Node]:
    """Divisions of exponentials or by a sum of them, also scaled or masked ones: the mark of a softmax, whether they
    are one or not."""
    found: list[fx.Node] = []
    for n in f.graph.nodes:
        below = tensor(n.args[1]) if n.target in DIVISIONS and n in f.live else None
        while below is not None and below.target in _BOUNDED:
            below = tensor(below.args[0])
        reduced = None if below is None else reduction(f, below, SUMS)
        of = scattered(below) if reduced is None else skip_casts(reduced[1])
        if of is None:
            continue
        top = skip_casts(tensor(n.args[0]))
        if of.target in EXPS or (top is not None and top.target in EXPS) or not _powers(of).isdisjoint(_powers(top)):
            found.append(n)
    return found


def _powers(n: fx.Node | None, depth: int = 4) -> set[fx.Node]:
    """The exponentials that a node scales, masks or casts."""
    if n is None or depth == 0:
        return set()
    if n.target in EXPS:
        return {n}
    if n.target not in _SCALINGS and n.target not in CASTS:
        return set()
    return {x for a in n.all_input_nodes for x in _powers(a, depth - 1)}


def stopped_inside(f: Facts, a: Anchor) -> fx.Node | None:
    """Where gradients are stopped between the scores and the weights: then these are a softmax's, and their gradients
    are not."""
    g, use = f.gradients, f.order[a.node]
    if g is None or not f.wants_grad(use):
        return None
    return next((n for n in sorted(_inside(a), key=f.order.__getitem__) if g.stopped(n, use)), None)


def _between(a: Anchor) -> set[fx.Node]:
    """Nodes from the scores to the anchor that might be anchors themselves: parts of its spelling."""
    return {n for n in _inside(a) if n.target in _RULES}


def _inside(a: Anchor) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    ends = {a.scores, a.sink}
    stack = [x for x in a.node.all_input_nodes if x not in ends]
    while stack:
        n = stack.pop()
        if n not in seen and n not in ends and n.op == "call_function" and n not in a.invariant:
            seen.add(n)
            stack += n.all_input_nodes
    return seen


def _softmax(f: Facts, n: fx.Node) -> Anchor | None:
    x: Any = n.args[0]
    dim = one_dim(f, x, argument(n, "dim"))
    empty: Empty | None = "zero" if n.target is aten._safe_softmax.default else None
    return None if dim is None else Anchor(n, x, dim, empty=empty)


def _quotient(f: Facts, n: fx.Node) -> Anchor | None:
    """exp(x) / sum(exp(x)), with or without the row maximum subtracted, and shares of other functions of scores."""
    top, bottom = tensor(n.args[0]), tensor(n.args[1])
    source = skip_casts(top)
    if top is None or bottom is None or source is None or n.kwargs.get("rounding_mode"):
        return None
    if written(f, bottom, bottom, n):
        return None
    power = exponent(source)
    if power is None:
        return _share(f, n, top, bottom)
    x, base = power
    found = denominator(f, bottom, x, base)
    if found is None or not f.is_tensor(x) or any(written(f, y, y, n) for y in (found.total, source, top)):
        return None
    if not (alike(f, found.of, found.total, top, n) or alike(f, found.of, found.total, source, n)):
        return None
    return Anchor(n, x, found.dim, reader=source, sink=found.sink, invariant=found.invariant, base=base)


def _share(f: Facts, n: fx.Node, top: fx.Node, bottom: fx.Node) -> Anchor | None:
    """f(s) / sum(f(s)), s / sum(|s|) and relu(s) / sum(|s|), for scores that compare two tensors."""
    found = denominator(f, bottom, None)
    if found is None or written(f, found.total, found.total, n):
        return None
    of, seen = found.of, found.total
    signed = of.target is aten.abs.default
    if signed and not written(f, of, of, seen):
        of, seen = of.all_input_nodes[0], of
    inside = tensor(top.args[0]) if signed and top.target in _RELUS and not written(f, top, top, n) else None
    if inside is not None and alike(f, of, seen, inside, top) and compares(f, inside):
        return Anchor(n, inside, found.dim, reader=top, sink=found.sink, ratio="clipped")
    if not alike(f, of, seen, top, n) or not compares(f, top):
        return None
    return Anchor(n, top, found.dim, sink=found.sink, ratio="signed" if signed else "plain")


@dataclass(frozen=True)
class Denominator:
    """`total` sums `of` along `dim`; `sink` is the logit of what is added to it, beside scores less `invariant`."""

    total: fx.Node
    of: fx.Node
    dim: int
    sink: float | fx.Node | None = None
    invariant: frozenset[fx.Node] = frozenset()


def denominator(f: Facts, n: fx.Node, x: fx.Node | None, base: float | None = None) -> Denominator | None:
    """What a sum of powers with exponents `x` is: alone, with a number or base^(sink - maximum) added, or above a
    number."""
    reduced = reduction(f, n, SUMS)
    if reduced is not None:
        return Denominator(*reduced)
    highest = _maximum_of(f, x)
    if n.target in _CLAMPS and highest is not None and len(n.args) == 2:
        of, least = tensor(n.args[0]), n.args[1]
        reduced = reduction(f, of, SUMS)
        whole = highest[0].target not in _CLAMPS and isinstance(least, int | float) and least <= 1
        if whole and reduced is not None and reduced[2] == highest[1]:
            return Denominator(*reduced)  # the largest exponential is 1
    if n.target not in _ADDS or n.kwargs.get("alpha", 1) != 1:
        return None
    for total, more in (n.args[:2], n.args[1::-1]):
        reduced = reduction(f, tensor(total), SUMS)
        if reduced is None:
            continue
        if isinstance(more, int | float) and more > 0:
            return Denominator(*reduced, sink=math.log(more))
        inverse = skip_casts(tensor(more))
        power = None if inverse is None else exponent(inverse)
        if power is None or power[1] != base or highest is None or x is None:
            continue
        difference, (subtracted, dim) = _difference(power[0]), highest
        if difference is None or dim != reduced[2]:
            continue
        sink, below = difference
        if alike(f, below, power[0], subtracted, x):
            return Denominator(*reduced, sink=sink, invariant=frozenset({subtracted}))
    return None


def _difference(n: fx.Node) -> tuple[float | fx.Node, fx.Node] | None:
    """(a, b) where a node is a - b."""
    given: tuple[Any, ...] = n.args
    if n.target is aten.neg.default:
        given = (0.0, *given)
    elif n.target is aten.rsub.Scalar:
        given = given[::-1]
    elif n.target not in _SUBS:
        return None
    if n.kwargs.get("alpha", 1) != 1 or len(given) != 2:
        return None
    first, second = given
    if not isinstance(second, fx.Node) or not isinstance(first, int | float | fx.Node):
        return None
    return (first if isinstance(first, fx.Node) else float(first)), second


def _maximum_of(f: Facts, x: fx.Node | None) -> tuple[fx.Node, int] | None:
    """(maximum, dimension) where `x` is something less its own maximum, or less a number that is larger."""
    x = skip_casts(x)
    if x is None or x.target not in _SUBS or x.kwargs.get("alpha", 1) != 1:
        return None
    scores, highest = tensor(x.args[0]), tensor(x.args[1])
    reduced = reduction(f, _unclamped(highest), MAXES)
    if scores is None or highest is None or reduced is None or not alike(f, reduced[1], reduced[0], scores, x):
        return None
    return highest, reduced[2]


def _unclamped(n: fx.Node | None) -> fx.Node | None:
    """The maximum that a node keeps from below by a number or, for each row, by another tensor."""
    n = skip_casts(n) if n is not None and skip_casts(n).target in _LARGER else n  # type: ignore[union-attr]
    if n is not None and n.target in _CLAMPS and len(n.args) == 2:
        return tensor(n.args[0])
    if n is not None and n.target in _LARGER:
        return next((a for a in n.all_input_nodes if _is_reduced(a)), n)
    return n


def _is_reduced(n: fx.Node) -> bool:
    """Whether a node is the maximum along a dimension, which may be put back."""
    n = skip_casts(n) or n
    n = skip_casts(tensor(n.args[0])) or n if n.target is aten.unsqueeze.default else n
    return is_maximum(n)


def without_maximum(f: Facts, a: Anchor) -> Anchor:
    """Whatever is constant along a row cancels, up to what -inf less -inf is: a NaN, as the softmax of such a row."""
    found = _maximum_of(f, a.scores) if a.empty is None else None
    beside = a.sink is not None and not a.invariant  # a number beside them does not cancel
    if found is None or found[1] != a.dim or beside:
        return a
    highest, _ = found
    reduced = reduction(f, _unclamped(highest), MAXES)
    assert reduced is not None
    return replace(a, invariant=frozenset(_down_to(highest, reduced[0])))


def _down_to(n: fx.Node, reduction: fx.Node) -> list[fx.Node]:
    """The nodes from `n` down to the reduction that it moves the result of, and keeps from below."""
    found = [n]
    while n is not reduction:
        inner = _unclamped(n)
        n = n.all_input_nodes[0] if inner is None or inner is n else inner
        found.append(n)
    return found


def _exp(f: Facts, n: fx.Node) -> Anchor | None:
    """exp(x - logsumexp(x)) and exp(log_softmax(x))."""
    given = tensor(n.args[0])
    x = skip_casts(given)
    if given is None or x is None or written(f, x, x, n) or written(f, given, given, n):
        return None
    if x.target in _LOGS:
        scores: Any = x.args[0]
        dim = one_dim(f, scores, argument(x, "dim"))
        return None if dim is None else Anchor(n, scores, dim, reader=x)
    if x.target in _SUBS and x.kwargs.get("alpha", 1) == 1:
        scores, reduced = tensor(x.args[0]), reduction(f, tensor(x.args[1]), _LSES)
        if scores is not None and reduced is not None and alike(f, reduced[1], reduced[0], scores, x):
            return Anchor(n, scores, reduced[2], reader=x)
    return None


_RULES: dict[object, Callable[[Facts, fx.Node], Anchor | None]] = {
    **dict.fromkeys(
        [aten.softmax.int, aten._softmax.default, aten._safe_softmax.default, aten.special_softmax.default], _softmax),
    **dict.fromkeys(DIVISIONS, _quotient),
    **dict.fromkeys([aten.exp.default, aten.exp_.default], _exp),
}  # fmt: skip
SDPA = aten.scaled_dot_product_attention.default
