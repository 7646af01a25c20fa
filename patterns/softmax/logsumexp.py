"""The logarithm of the sum of a row's exponentials, where the model uses it beside the softmax.

    lse[b, h, i] = log sum_j exp(score[b, h, i, j])

A gate `out * sigmoid(lse - sink)` and the merging of partial attentions read it; a fused kernel gives it anyway.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import fx

from attncc.ir.build import ONE, ZERO, op
from attncc.ir.expr import ROUNDINGS, Const, Expr, Load, Op, free
from attncc.patterns.site import (
    DOT,
    Facts,
    Frame,
    Lse,
    Parts,
    Reader,
    is_maximum,
    op_name,
    rows_of,
    skip_casts,
)
from attncc.patterns.softmax.anchors import Anchor, Term

#: The most dimensions that one axis is looked for in.
_MOST_DIGITS = 4


def row_sums(p: Parts, frame: Frame, term: Term) -> tuple[Lse, bool] | None:
    """The live `logsumexp` of a term's scores, if there is one and it can be had from the attention; and whether it is
    of the scores without what is alike for every key."""
    f, anchor = p.facts, term.anchor
    if p.sink is not None or p.half or p.summed:
        return None
    reader = frame.reader(frozenset({frame.c}))
    own = anchor.scores_at(reader, term.at)
    less = without_shift(frame, own)
    summed = ((n, _exponents(frame, reader, term, n)) for n in f.graph.nodes if n in f.live)
    found = [(n, of is not own) for n, of in summed if of in (own, less) and _read_beside(f, n, anchor)]
    if len(found) != 1 or any(f.writes(n, f.order[found[0][0]], frame.use) for n in (p.q.node, p.k.node, p.v.node)):
        return None
    rows = rows_of(p, anchor.node, anchor.dim, term.at)
    return None if rows is None else (Lse(found[0][0], rows), found[0][1])


def _exponents(frame: Frame, r: Reader, term: Term, n: fx.Node) -> Expr | None:
    """What a node sums the exponentials of over the keys, where it holds the logarithm of the sum of a row."""
    f, dim = r.facts, term.anchor.dim
    shape, key = f.shape(term.anchor.node), term.at[dim]
    rows = {(*shape[:dim], *middle, *shape[dim + 1 :]): middle for middle in ((), (ONE,))}
    written = op_name(n) == "add" and any(op_name(x) == "log" for x in n.all_input_nodes)
    if not (written or n.target is torch.ops.aten.logsumexp.default) or f.shape(n) not in rows:
        return None
    row = (*term.at[:dim], *(ZERO for _ in rows[f.shape(n)]), *term.at[dim + 1 :])
    match frame.reader().value_at(n, row):
        case Op("add", (m, Op("log", (total,)))) | Op("add", (Op("log", (total,)), m)):
            match r.reduced(total, key, "sum"):
                case Op("exp", (Op("sub", (x, highest)),)) if highest is m:
                    return x
                case _:
                    return None
        case value:
            return r.reduced(value, key, "logsumexp")


def without_shift(frame: Frame, x: Expr) -> Expr:
    """A score less what was reduced over the keys and is added to it, which cancels in the quotient.

    Not so other terms that are alike for every key: a huge one leaves nothing of the scores that it is added to."""
    without = partial(without_shift, frame)
    match x:
        case Op("add", (a, b)) if _is_shift(frame, a) or _is_shift(frame, b):
            return without(b if _is_shift(frame, a) else a)
        case Op("sub", (a, b)) if _is_shift(frame, b):
            return without(a)
        case Op("sub", (a, b)) if _is_shift(frame, a):
            return op("neg", without(b))
        case Op("mul" | "div", (a, Const() as factor)):
            return op(x.name, without(a), factor)
        case Op(name, (a,)) if name in ROUNDINGS:
            inner = without(a)
            return x if inner is a else inner
        case _:
            return x


def _is_shift(frame: Frame, x: Expr) -> bool:
    """Whether a number of a row was reduced over its keys, and at most kept within bounds."""
    f = frame.facts
    match x:
        case Load(tensor, index) if frame.c not in free(x) and not tensor.startswith(DOT):
            n = f.by_name[tensor]
            if is_maximum(skip_casts(n) or n) or frame.reader().reduced(x, frame.c, "logsumexp") is not None:
                return True
            value = frame.reader().value_at(n, index)
            return not isinstance(value, Load) and _is_shift(frame, value)
        case Op("log", (Load() as total,)):
            return frame.reader().reduced(total, frame.c, "sum") is not None
        case Op(name, args) if name in (*ROUNDINGS, "max", "maxfirst", "min", "minfirst", "add", "stop", "where"):
            return frame.c not in free(x) and any(_is_shift(frame, y) for y in args)
        case _:
            return False


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
