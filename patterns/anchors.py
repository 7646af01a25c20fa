"""Anchors: the places where a graph normalises scores, however it is spelled."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from attncc.ir.attention import Empty, Normalizer
from attncc.patterns.facts import Facts
from attncc.patterns.schema import argument

aten = torch.ops.aten


@dataclass(frozen=True)
class Anchor:
    """`node` holds the normalised weights of `scores` along `dim`, as `reader` (if not `node` itself) sees them.
    `invariant` are nodes that are constant along `dim` and cancel in the quotient (a row maximum). `empty` overrides
    what a row of all -inf gives. `sink` is the logit of what the denominator has beside the exponentials."""

    node: fx.Node
    scores: fx.Node
    dim: int
    normalizer: Normalizer = "softmax"
    empty: Empty | None = None
    invariant: frozenset[fx.Node] = frozenset()
    reader: fx.Node | None = None
    sink: float | None = None

    def read_at(self, f: Facts) -> int:
        """The position at which the scores are read: a later write to them changes nothing."""
        return f.order[self.reader or self.node]


def anchors(f: Facts) -> list[Anchor]:
    """Every normaliser of the graph, in order. A softmax spelled in several ops gives its last one."""
    found: list[Anchor] = []
    inner: set[fx.Node] = set()
    for n in f.graph.nodes:
        rule = _RULES.get(n.target) if n.op == "call_function" else None
        anchor = None if rule is None else rule(f, n)
        if anchor is not None and f.rank(anchor.scores) > 0 and f.value(anchor.scores).is_floating_point():
            found.append(without_maximum(f, anchor))
            inner |= _between(anchor)
    return [a for a in found if a.node not in inner]


def near_misses(f: Facts) -> list[fx.Node]:
    """Divisions of exponentials or by a sum of them, the mark of a softmax, whether they are one or not."""
    found: list[fx.Node] = []
    for n in f.graph.nodes:
        below = _tensor(n.args[1]) if n.target in DIVISIONS and n in f.live else None
        while below is not None and below.target in _BOUNDED:
            below = _tensor(below.args[0])
        reduced = None if below is None else _reduction(f, below, SUMS)
        of = None if reduced is None else skip_casts(reduced[1])
        if of is None:
            continue
        top = skip_casts(_tensor(n.args[0]))
        if of.target in EXPS or (top is not None and top.target in EXPS):
            found.append(n)
    return found


def _between(a: Anchor) -> set[fx.Node]:
    """Nodes from the scores to the anchor: parts of its spelling."""
    seen: set[fx.Node] = set()
    stack = [x for x in a.node.all_input_nodes if x is not a.scores]
    while stack:
        n = stack.pop()
        if n not in seen and n is not a.scores and n.op == "call_function" and n not in a.invariant:
            seen.add(n)
            stack += n.all_input_nodes
    return {n for n in seen if n.target in _RULES}


def _tensor(x: Any) -> fx.Node | None:
    return x if isinstance(x, fx.Node) else None


def one_dim(f: Facts, n: fx.Node, dim: Any) -> int | None:
    """One dimension out of an int or a list of one."""
    dims: tuple[Any, ...] = (dim,) if isinstance(dim, int) else tuple(dim or ())
    return int(dims[0]) % max(f.rank(n), 1) if len(dims) == 1 else None


def _softmax(f: Facts, n: fx.Node) -> Anchor | None:
    x: Any = n.args[0]
    dim = one_dim(f, x, argument(n, "dim"))
    empty: Empty | None = "zero" if n.target is aten._safe_softmax.default else None
    return None if dim is None else Anchor(n, x, dim, empty=empty)


def skip_casts(n: fx.Node | None) -> fx.Node | None:
    while n is not None and n.target in _CASTS:
        n = _tensor(n.args[0])
    return n


_CASTS = (aten.to.dtype, aten._to_copy.default, aten.clone.default, aten.detach.default)
SUMS = (aten.sum.dim_IntList,)
_MAXES = (aten.amax.default, aten.max.dim)
_LSES = (aten.logsumexp.default,)
_SUBS = (aten.sub.Tensor, aten.sub_.Tensor)
_ADDS = (aten.add.Tensor, aten.add_.Tensor)
_CLAMPS = (aten.clamp.default, aten.clamp_min.default, aten.clamp_.default)
DIVISIONS = (aten.div.Tensor, aten.div_.Tensor)
#: What keeps a denominator away from zero.
_BOUNDED = (*_ADDS, *_CLAMPS)
EXPS = (aten.exp.default, aten.exp_.default)


def is_maximum(n: fx.Node) -> bool:
    """Whether a node is the maximum along dimensions of a tensor."""
    if getattr(n.target, "__name__", "") == "getitem" and n.args[1] == 0:
        n = n.all_input_nodes[0]
    return n.target in _MAXES


def _reduction(f: Facts, n: fx.Node | None, targets: tuple[object, ...]) -> tuple[fx.Node, fx.Node, int] | None:
    """(reduction, what it reduces, dimension) where `n` is a reduction with one of the ops that keeps its dimension, or
    has it put back: without, it would broadcast along another one."""
    n = skip_casts(n)
    restored: Any = None
    if n is not None and n.target is aten.unsqueeze.default:
        restored = argument(n, "dim") % f.rank(n)
        n = skip_casts(_tensor(n.args[0]))
    if n is not None and getattr(n.target, "__name__", "") == "getitem" and n.args[1] == 0:
        n = _tensor(n.args[0])
    of = _tensor(n.args[0]) if n is not None and n.target in targets else None
    if n is None or of is None:
        return None
    dim = one_dim(f, of, argument(n, "dim"))
    kept = restored is None if argument(n, "keepdim") else restored == dim
    return (n, of, dim) if dim is not None and kept else None


def _alike(f: Facts, a: fx.Node, seen_a: fx.Node, b: fx.Node, seen_b: fx.Node, depth: int = 8) -> bool:
    """Whether `a` as `seen_a` reads it and `b` as `seen_b` reads it are the same values: one node, or one operation on
    the same inputs, with no write to it in between."""
    if a is b:
        return not _written(f, a, seen_a, seen_b)
    if a.target is not b.target or a.target not in _REPEATABLE or a.kwargs != b.kwargs or len(a.args) != len(b.args):
        return False
    if depth == 0 or _written(f, a, a, seen_a) or _written(f, b, b, seen_b):
        return False
    return all(
        _alike(f, x, a, y, b, depth - 1) if isinstance(x, fx.Node) and isinstance(y, fx.Node) else x == y
        for x, y in zip(a.args, b.args, strict=True)
    )


_REPEATABLE = {operator.getitem, aten.exp.default, aten.sub.Tensor, *_CASTS, *_MAXES}


def _written(f: Facts, n: fx.Node, *between: fx.Node) -> bool:
    """Whether something writes to `n` after the first and before the last of some nodes."""
    at = sorted(f.order[x] for x in between)
    return bool(f.writes(n, at[0], at[-1]))


def _quotient(f: Facts, n: fx.Node) -> Anchor | None:
    """exp(x) / sum(exp(x)), with or without the row maximum subtracted."""
    top, bottom = _tensor(n.args[0]), _tensor(n.args[1])
    source = skip_casts(top)
    if top is None or bottom is None or source is None or n.kwargs.get("rounding_mode") or source.target not in EXPS:
        return None
    x = _tensor(source.args[0])
    found = denominator(f, bottom, x)
    if found is None or x is None or not f.is_tensor(x) or _written(f, bottom, bottom, n):
        return None
    if any(_written(f, y, y, n) for y in (found.total, source, top)):
        return None
    if not (_alike(f, found.of, found.total, top, n) or _alike(f, found.of, found.total, source, n)):
        return None
    return Anchor(n, x, found.dim, reader=source, sink=found.sink, invariant=found.invariant)


@dataclass(frozen=True)
class Denominator:
    """`total` sums `of` along `dim`; `sink` is the logit of what is added to it, beside scores less `invariant`."""

    total: fx.Node
    of: fx.Node
    dim: int
    sink: float | None = None
    invariant: frozenset[fx.Node] = frozenset()


def denominator(f: Facts, n: fx.Node, x: fx.Node | None) -> Denominator | None:
    """What a sum of exponentials of `x` is, alone, with a number or exp(-maximum) added, or kept above a number."""
    reduced = _reduction(f, n, SUMS)
    if reduced is not None:
        return Denominator(*reduced)
    highest = _maximum_of(f, x)
    if n.target in _CLAMPS and highest is not None and len(n.args) == 2:
        of, least = _tensor(n.args[0]), n.args[1]
        reduced = _reduction(f, of, SUMS)
        if isinstance(least, int | float) and least <= 1 and reduced is not None and reduced[2] == highest[1]:
            return Denominator(*reduced)  # the largest exponential is 1
    if n.target not in _ADDS or n.kwargs.get("alpha", 1) != 1:
        return None
    for total, more in (n.args[:2], n.args[1::-1]):
        reduced = _reduction(f, _tensor(total), SUMS)
        if reduced is None:
            continue
        if isinstance(more, int | float) and more > 0:
            return Denominator(*reduced, sink=math.log(more))
        inverse = skip_casts(_tensor(more))
        below = _tensor(inverse.args[0]) if inverse is not None and inverse.target in EXPS else None
        if inverse is None or below is None or below.target is not aten.neg.default or highest is None or x is None:
            continue
        subtracted, dim = highest
        if dim == reduced[2] and _alike(f, below.args[0], below, subtracted, x):  # type: ignore[arg-type]
            return Denominator(*reduced, sink=0.0, invariant=frozenset({subtracted}))
    return None


def _maximum_of(f: Facts, x: fx.Node | None) -> tuple[fx.Node, int] | None:
    """(maximum, dimension) where `x` is something less its own maximum."""
    x = skip_casts(x)
    if x is None or x.target not in _SUBS or x.kwargs.get("alpha", 1) != 1:
        return None
    scores, highest = _tensor(x.args[0]), _tensor(x.args[1])
    reduced = _reduction(f, highest, _MAXES)
    if scores is None or highest is None or reduced is None or not _alike(f, reduced[1], reduced[0], scores, x):
        return None
    return highest, reduced[2]


def without_maximum(f: Facts, a: Anchor) -> Anchor:
    """Whatever is constant along a row cancels, up to what -inf less -inf is: a NaN, as the softmax of such a row."""
    found = _maximum_of(f, a.scores) if a.empty is None else None
    beside = a.sink is not None and not a.invariant  # a number beside them does not cancel
    if found is None or found[1] != a.dim or beside:
        return a
    highest, _ = found
    reduced = _reduction(f, highest, _MAXES)
    assert reduced is not None
    return replace(a, invariant=frozenset(_down_to(highest, reduced[0])))


def _down_to(n: fx.Node, reduction: fx.Node) -> list[fx.Node]:
    """The nodes from `n` down to the reduction that it moves the result of."""
    found = [n]
    while n is not reduction:
        n = n.all_input_nodes[0]
        found.append(n)
    return found


def _exp(f: Facts, n: fx.Node) -> Anchor | None:
    """exp(x - logsumexp(x)) and exp(log_softmax(x))."""
    given = _tensor(n.args[0])
    x = skip_casts(given)
    if given is None or x is None or _written(f, x, x, n) or _written(f, given, given, n):
        return None
    if x.target in (aten.log_softmax.int, aten._log_softmax.default):
        scores: Any = x.args[0]
        dim = one_dim(f, scores, argument(x, "dim"))
        return None if dim is None else Anchor(n, scores, dim, reader=x)
    if x.target in _SUBS and x.kwargs.get("alpha", 1) == 1:
        scores, reduced = _tensor(x.args[0]), _reduction(f, _tensor(x.args[1]), _LSES)
        if scores is not None and reduced is not None and _alike(f, reduced[1], reduced[0], scores, x):
            return Anchor(n, scores, reduced[2], reader=x)
    return None


_RULES: dict[object, Callable[[Facts, fx.Node], Anchor | None]] = {
    **dict.fromkeys(
        [aten.softmax.int, aten._softmax.default, aten._safe_softmax.default], _softmax),
    **dict.fromkeys(DIVISIONS, _quotient),
    **dict.fromkeys(EXPS, _exp),
}  # fmt: skip
SDPA = aten.scaled_dot_product_attention.default
