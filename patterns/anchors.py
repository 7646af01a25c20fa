"""Anchors: the places where a graph normalises scores, however it is spelled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from attncc.ir.attention import Empty, Normalizer
from attncc.patterns.facts import Facts, argument

aten = torch.ops.aten


@dataclass(frozen=True)
class Anchor:
    """`node` holds the normalised weights of `scores` along `dim`. `invariant` are nodes that are constant along `dim`
    and cancel in the quotient (a row maximum). `empty` overrides what a row of all -inf gives."""

    node: fx.Node
    scores: fx.Node
    dim: int
    normalizer: Normalizer = "softmax"
    empty: Empty | None = None
    invariant: frozenset[fx.Node] = frozenset()


def anchors(f: Facts) -> list[Anchor]:
    """Every normaliser of the graph, in order. A softmax spelled in several ops gives its last one."""
    found: list[Anchor] = []
    inner: set[fx.Node] = set()
    for n in f.graph.nodes:
        rule = _RULES.get(n.target) if n.op == "call_function" else None
        anchor = None if rule is None else rule(f, n)
        if anchor is not None and f.rank(anchor.scores) > 0 and f.value(anchor.scores).is_floating_point():
            found.append(_without_maximum(f, anchor))
            inner |= _between(anchor)
    return [a for a in found if a.node not in inner]


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


def _dim(f: Facts, n: fx.Node, dim: object) -> int | None:
    """One dimension out of an int or a list of one."""
    if isinstance(dim, list | tuple):
        dim = dim[0] if len(dim) == 1 else None
    return dim % max(f.rank(n), 1) if isinstance(dim, int) else None


def _softmax(f: Facts, n: fx.Node) -> Anchor | None:
    x: Any = n.args[0]
    dim = _dim(f, x, argument(n, "dim"))
    empty: Empty | None = "zero" if n.target is aten._safe_softmax.default else None
    return None if dim is None else Anchor(n, x, dim, empty=empty)


def _skip_casts(n: fx.Node | None) -> fx.Node | None:
    while n is not None and n.target in (aten.to.dtype, aten._to_copy.default, aten.clone.default, aten.detach.default):
        n = _tensor(n.args[0])
    return n


def _reduction(f: Facts, n: fx.Node | None, targets: tuple[object, ...], of: fx.Node | None) -> int | None:
    """The dimension along which `n` reduces `of` with one of the ops, keeping or later restoring the dimension."""
    n = _skip_casts(n)
    if n is not None and n.target is aten.unsqueeze.default:
        n = _skip_casts(_tensor(n.args[0]))
    if n is not None and getattr(n.target, "__name__", "") == "getitem" and n.args[1] == 0:
        n = _tensor(n.args[0])
    if n is None or n.target not in targets or (of is not None and _tensor(n.args[0]) is not of):
        return None
    return _dim(f, _tensor(n.args[0]) or n, n.args[1] if len(n.args) > 1 else None)


_SUMS = (aten.sum.dim_IntList,)
_MAXES = (aten.amax.default, aten.max.dim)
_LSES = (aten.logsumexp.default,)


def _quotient(f: Facts, n: fx.Node) -> Anchor | None:
    """exp(x) / sum(exp(x)), with or without the row maximum subtracted and a clamp or epsilon on the sum left out."""
    top, bottom = _tensor(n.args[0]), _tensor(n.args[1])
    if top is None or bottom is None or n.kwargs.get("rounding_mode"):
        return None
    source = _skip_casts(top)
    if source is None or source.target is not aten.exp.default:
        return None
    dim = _reduction(f, bottom, _SUMS, top)
    if dim is None:
        dim = _reduction(f, bottom, _SUMS, source)
    x = _tensor(source.args[0])
    if dim is None or x is None or not f.is_tensor(x):
        return None
    return Anchor(n, x, dim)


def _without_maximum(f: Facts, a: Anchor) -> Anchor:
    x = _skip_casts(a.scores)
    if x is not None and x.target is aten.sub.Tensor:
        scores, highest = _tensor(x.args[0]), _tensor(x.args[1])
        if scores is not None and highest is not None and _reduction(f, highest, _MAXES, scores) == a.dim:
            return replace(a, invariant=frozenset({highest}))
    return a


def _exp(f: Facts, n: fx.Node) -> Anchor | None:
    """exp(x - logsumexp(x)) and exp(log_softmax(x))."""
    x = _skip_casts(_tensor(n.args[0]))
    if x is None:
        return None
    if x.target in (aten.log_softmax.int, aten._log_softmax.default):
        scores: Any = x.args[0]
        dim = _dim(f, scores, argument(x, "dim"))
        return None if dim is None else Anchor(n, scores, dim)
    if x.target is aten.sub.Tensor:
        scores = _tensor(x.args[0])
        dim = None if scores is None else _reduction(f, _tensor(x.args[1]), _LSES, scores)
        if scores is not None and dim is not None:
            return Anchor(n, scores, dim)
    return None


_RULES: dict[object, Callable[[Facts, fx.Node], Anchor | None]] = {
    **dict.fromkeys(
        [aten.softmax.int, aten._softmax.default, aten._safe_softmax.default], _softmax),
    aten.div.Tensor: _quotient,
    aten.exp.default: _exp,
}  # fmt: skip
SDPA = aten.scaled_dot_product_attention.default
