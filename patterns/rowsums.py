"""The logarithm of the sum of a row's exponentials, where the model uses it beside the softmax.

    lse[b, h, i] = log sum_j exp(score[b, h, i, j])

A gate `out * sigmoid(lse - sink)` and the merging of partial attentions read it; a fused kernel gives it anyway.
"""

from __future__ import annotations

import torch
from torch import fx

from attncc.ir.affine import poly
from attncc.ir.build import ONE, ZERO, add, mul
from attncc.ir.expr import Expr
from attncc.patterns.anchors import Anchor
from attncc.patterns.assemble import Lse, Parts
from attncc.patterns.facts import Facts
from attncc.patterns.moves import Point
from attncc.patterns.reductions import one_dim, skip_casts
from attncc.patterns.schema import argument


def row_sums(p: Parts, anchor: Anchor, at: Point, use: int) -> Lse | None:
    """The live `logsumexp` of the anchor's scores, if there is one and it can be had from the attention read `at`."""
    f = p.facts
    found = [n for n in _users(f, anchor.scores) if _is_row_sum(f, n, anchor)]
    powers = anchor.shares == "powers" and anchor.base is None
    if len(found) != 1 or not powers or p.sink is not None or p.normalizer != "softmax" or p.half or p.summed:
        return None
    (node,) = found
    sources = (p.q.node, p.k.node, p.v.node)
    if any(f.writes(n, f.order[node], use) for n in sources):
        return None
    order = row_order(p, anchor, at)
    return None if order is None else Lse(node, order)


def row_order(p: Parts, anchor: Anchor, at: Point) -> tuple[int, ...] | None:
    """How the attention's axes (*batch, i) are permuted where they lie as the rows of the softmax, read `at`; none if
    these are others."""
    shape = p.facts.shape(anchor.scores)
    rows = [(x, s) for d, (x, s) in enumerate(zip(at, shape, strict=True)) if d != anchor.dim]
    batch = [x for x in p.out if x is not ZERO and x is not p.i and x is not p.e]
    axes = [*batch, *([] if p.i is None else [p.i])]
    if poly(_flat(rows)) == poly(_flat([(x, p.extents[x]) for x in axes])):
        return ()
    plain = [x for x, s in rows if s is not ONE]
    if len(plain) == len(axes) and set(plain) == set(axes):
        return tuple(axes.index(x) for x in plain)
    return None


def _users(f: Facts, scores: fx.Node) -> list[fx.Node]:
    """Live users of scores and of casts of them."""
    source = skip_casts(scores) or scores
    casts = [n for n in f.graph.nodes if n in f.live and skip_casts(n) is source]
    return [u for n in dict.fromkeys([source, *casts]) for u in n.users if u in f.live]


def _is_row_sum(f: Facts, n: fx.Node, anchor: Anchor) -> bool:
    if n.target is not torch.ops.aten.logsumexp.default:
        return False
    (of, *_) = n.all_input_nodes
    read = (f.order[n], anchor.read_at(f))
    return one_dim(f, of, argument(n, "dim")) == anchor.dim and not f.writes(of, min(read), max(read))


def _flat(axes: list[tuple[Expr, Expr]]) -> Expr:
    """The row-major index of a point."""
    index: Expr = ZERO
    for x, extent in axes:
        index = add(mul(index, extent), x)
    return index
