"""The logarithm of the sum of a row's exponentials, where the model uses it beside the softmax.

    lse[b, h, i] = log sum_j exp(score[b, h, i, j])

A gate `out * sigmoid(lse - sink)` and the merging of partial attentions read it; a fused kernel gives it anyway.
"""

from __future__ import annotations

from functools import reduce
from itertools import permutations

import torch
from torch import fx

from attncc.ir.affine import poly, simplify
from attncc.ir.build import ONE, ZERO, add, mul
from attncc.ir.expr import Expr, free
from attncc.patterns.site import Facts, Lse, Parts, Point, Rows, argument, one_dim, skip_casts
from attncc.patterns.softmax.anchors import Anchor

#: The most dimensions that one axis is looked for in.
_MOST_DIGITS = 4


def row_sums(p: Parts, anchor: Anchor, at: Point, use: int) -> Lse | None:
    """The live `logsumexp` of the anchor's scores, if there is one and it can be had from the attention read `at`."""
    f = p.facts
    found = [n for n in _users(f, anchor.scores) if _is_row_sum(f, n, anchor) and _read_beside(f, n, anchor)]
    powers = anchor.ratio == "powers" and anchor.base is None
    if len(found) != 1 or not powers or p.sink is not None or p.normalizer != "softmax" or p.half or p.summed:
        return None
    (node,) = found
    sources = (p.q.node, p.k.node, p.v.node)
    if any(f.writes(n, f.order[node], use) for n in sources):
        return None
    rows = rows_of(p, anchor, at)
    return None if rows is None else Lse(node, rows)


def rows_of(p: Parts, anchor: Anchor, at: Point) -> Rows | None:
    """How the attention's rows lie where they are those of the softmax, read `at`; none if these are others.

    An axis of the attention may be several of the softmax's, in any order: windows and batches, rows of an image."""
    shape = p.facts.shape(anchor.scores)
    rows = [(x, s) for d, (x, s) in enumerate(zip(at, shape, strict=True)) if d != anchor.dim]
    batch = [x for x in p.out if x is not ZERO and x is not p.i and x is not p.e]
    axes = [*batch, *([] if p.i is None else [p.i])]
    if poly(_flat(rows)) == poly(_flat([(x, p.extents[x]) for x in axes])):
        return Rows()
    kept = [(x, s) for x, s in rows if s is not ONE]
    digits = [n for axis in axes for n in _digits(kept, axis, p.extents[axis])]
    if sorted(digits) != list(range(len(kept))):
        return None
    return Rows(tuple(kept[n][1] for n in digits), tuple(digits.index(n) for n in range(len(kept))))


def _digits(rows: list[tuple[Expr, Expr]], axis: Expr, extent: Expr) -> tuple[int, ...]:
    """The rows' dimensions that together count through an axis, the slowest first; none if there are no such."""
    own = [n for n, (x, _) in enumerate(rows) if axis in free(x)]
    for order in permutations(own) if len(own) <= _MOST_DIGITS else ():
        found = [rows[n] for n in order]
        if simplify(_flat(found), {axis: extent}) is axis and poly(reduce(mul, (s for _, s in found))) == poly(extent):
            return order
    return ()


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


def _read_beside(f: Facts, n: fx.Node, anchor: Anchor) -> bool:
    """Whether anything but the softmax, which may be spelled with it, reads a sum."""
    stack = [n]
    while stack:
        for user in stack.pop().users:
            if user is anchor.node or user not in f.live:
                continue
            if f.order[user] > f.order[anchor.node]:
                return True
            stack.append(user)
    return False


def _flat(axes: list[tuple[Expr, Expr]]) -> Expr:
    """The row-major index of a point."""
    index: Expr = ZERO
    for x, extent in axes:
        index = add(mul(index, extent), x)
    return index
