"""From a softmax and the product that sums over it to an attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import fx

from attncc.ir.affine import linear_in, poly
from attncc.ir.analysis import zero_at_zero
from attncc.ir.attention import Empty, S, W
from attncc.ir.build import ONE, TRUE, ZERO, stop, sub
from attncc.ir.expr import Expr, Index, Load, Op, free, loads, rewrite, substitute
from attncc.ir.gradients import plain, thawed
from attncc.ir.reasons import because
from attncc.patterns.site import (
    DOT,
    Facts,
    Frame,
    Lifted,
    Lse,
    Overwritten,
    Parts,
    Product,
    Unreadable,
    assembled,
    made_of,
    of_scores,
    op_name,
    products_in,
    sees_itself,
    stored,
)
from attncc.patterns.softmax.anchors import Anchor, Term
from attncc.patterns.softmax.empty_rows import masked_again, unguarded, zeroed_rows
from attncc.patterns.softmax.logsumexp import row_sums, without_shift
from attncc.patterns.softmax.mixed_heads import mixture_in
from attncc.patterns.softmax.ratios import as_softmax
from attncc.patterns.softmax.sliding import Slid, slid
from attncc.patterns.softmax.vector_weights import shares_components


def lift_softmax(frame: Frame, term: Term) -> Lifted:
    """The attention that one softmax of a product is. Raises Unreadable with the reason, and VerifyError."""
    anchor = term.anchor
    if frame.facts.shape(anchor.node)[anchor.dim] is ONE:
        raise Unreadable(anchor.node, because("single-key-softmax"))
    slide = slid(frame, term)
    if slide is not None:
        return attention_of(parts_of_slid(slide), slide.frame, slide.term)
    offset = _offset(frame, term)
    parts = parts_of(frame, term)
    score = parts.score if anchor.shifted else without_shift(frame, parts.score)
    if poly(frame.facts.shape(anchor.node)[anchor.dim]) != poly(frame.product.extent):
        if anchor.sink is not None:
            raise Unreadable(anchor.node, because("two-sinks"))
        whole = _sink(frame.over(term.mixed), term, offset)
        sink = without_shift(frame, whole)
        alike = (sink is whole) == (score is parts.score)
        parts, score = replace(parts, sink=sink if alike else whole), score if alike else parts.score
    lse = row_sums(parts, frame, term)
    if lse is None or lse[1]:
        parts = replace(parts, score=score)
    if lse is not None:
        site = attention_of(replace(parts, outputs=("out", "lse")), frame, term, lse[0])
        if site.attention.empty != "nan" or op_name(lse[0].node) == "logsumexp":
            return site  # else a row of -inf has sums that are NaN where they are written out
    return attention_of(parts, frame, term)


def parts_of(frame: Frame, term: Term) -> Parts:
    """What an attention is made of that sums the columns of a softmax at which the product reads it."""
    frame = frame.over(term.mixed)
    return _parts(frame, term, *_score(frame, term))


def parts_of_slid(slide: Slid) -> Parts:
    return _parts(slide.frame, slide.term, slide.score, slide.found)


def _parts(frame: Frame, term: Term, score: Expr, found: Product) -> Parts:
    f, anchor, product = frame.facts, term.anchor, frame.product
    if product.bias is not None or product.alpha != 1.0:
        raise Unreadable(product.node, because("product-scales"))
    if any(_drops(f, x) for x in loads(term.weight)):
        raise Unreadable(anchor.node, because("dropout"))
    sink = anchor.sink_at(term.at)
    weight = rewrite(term.weight, lambda x: stored(f, x, frame.use, frame.extents))
    score, frozen_score = thawed(score, S)
    weight, frozen_weight = thawed(weight, W)
    score, weight = as_softmax(anchor, score, weight, wants_grad=f.wants_grad(frame.use))
    again = masked_again(weight, score, half=f.dtype(anchor.scores) == torch.float16)
    weight = weight if again is None else again
    bare = unguarded(frame.reader(), term, weight, score, frame.c)
    empty: Empty = "zero" if bare is not None else anchor.empty or "nan"
    return replace(
        frame.parts(found, frozen_score(score), half=anchor.scores, empty=empty),
        sink=None if sink is None else _of_row(frame, anchor, sink),
        weight=frozen_weight(weight if bare is None else bare),
        summed=tuple(term.mixed), zeroed=again is not None,
    )  # fmt: skip


def attention_of(parts: Parts, frame: Frame, term: Term, lse: Lse | None = None) -> Lifted:
    site = assembled(parts, frame.node, term.anchor.node, lse=lse)
    if site.attention.mask is not TRUE and not zero_at_zero(plain(parts.weight), W):
        raise Unreadable(frame.product.node, because("hidden-keys-weighted"))
    a = site.attention
    if a.empty == "nan" and a.weight is not W and sees_itself(a):  # there is no such row
        return replace(site, attention=replace(a, empty="zero"))
    return replace(site, attention=zeroed_rows(a))


def _drops(f: Facts, x: Load) -> bool:
    return f.by_name[x.tensor.removeprefix(DOT)].target is torch.ops.aten.dropout.default


def _offset(frame: Frame, term: Term) -> int:
    """o, where the softmax is read at c + o along its own axis; 0 where the same keys are read in another order."""
    anchor, c = term.anchor, frame.c
    for d, x in enumerate(term.at):
        if d != anchor.dim and c in free(x):
            raise Unreadable(anchor.node, because("other-axis"))
    x = term.at[anchor.dim]
    columns = frame.facts.shape(anchor.node)[anchor.dim]
    if poly(columns) == poly(frame.product.extent) and _reorders(x, c, columns):
        return 0
    line = linear_in(x, c)
    if line is None or line[0] != {(): 1} or any(m for m in line[1]):
        raise Unreadable(anchor.node, because("other-axis"))
    return line[1].get((), 0)


def _reorders(x: Expr, c: Index, columns: Expr) -> bool:
    """Whether `x` takes every value below `columns` once as c does: c, c reversed, or c turned round."""
    if isinstance(x, Op) and x.name == "mod" and poly(x.args[1]) == poly(columns):
        line = linear_in(x.args[0], c)
        return line is not None and line[0] in ({(): 1}, {(): -1})
    return x is c or poly(x) == poly(sub(sub(columns, ONE), c))


def _score(frame: Frame, term: Term) -> tuple[Expr, Product]:
    """The score with the product of queries and keys as `s`, and that product. Another product that was written to in
    place is read as the write left it."""
    leaves: frozenset[fx.Node] = frozenset()
    while True:
        try:
            return _score_over(frame, term, leaves)
        except Overwritten as error:
            if error.by in leaves:
                raise
            leaves |= {error.by}


def _score_over(frame: Frame, term: Term, leaves: frozenset[fx.Node]) -> tuple[Expr, Product]:
    """The same where the values of `leaves` are loaded."""
    f, anchor, c = frame.facts, term.anchor, frame.c
    reader = frame.reader(frozenset({c}), leaves)
    rough, frozen = _thawed(anchor.scores_at(reader, term.at))
    mixture = mixture_in(frame, rough)
    found = mixture.inner if mixture is not None else next(products_in(f, rough, c, frame.rows), None)
    found = found or _of_windows(frame, term, rough)
    if found is None:
        reason = because("vector-attention") if shares_components(frame) else of_scores(f, anchor.scores)
        raise reader.lost or Unreadable(anchor.scores, reason)
    score = rough
    if found.row is not None:
        reader = frame.reader(frozenset({c, found.row}), leaves)
        score, frozen = _thawed(anchor.scores_at(reader, term.at))
        mixture = None if mixture is None else mixture_in(frame, score)
    mixed = None if mixture is None else mixture.product()
    if mixture is not None and mixed is not None:
        found, score = mixed, substitute(score, {mixture.whole: mixed.load})
    score = rewrite(score, lambda x: found.value if x is found.load else stored(f, x, frame.use, frame.extents))
    return frozen(score), found


def _thawed(score: Expr) -> tuple[Expr, Callable[[Expr], Expr]]:
    """A score without stops at the products in it, where all of them are stopped, and what puts these back."""
    bare, frozen = thawed(score)
    if bare is score:
        bare, frozen = thawed(score, *(x for x in loads(score) if x.tensor.startswith(DOT)))
        return bare, frozen if bare is score else partial(stop, follows=lambda x: x is S)
    return bare, frozen


def _sink(frame: Frame, term: Term, offset: int) -> Expr:
    """The logit of the one softmax column that no value belongs to."""
    f, anchor, keys = frame.facts, term.anchor, frame.product.extent
    columns = f.shape(anchor.node)[anchor.dim]
    if poly(sub(columns, keys)) != {(): 1} or offset not in (0, 1):
        raise Unreadable(anchor.node, because("other-keys"))
    column = keys if offset == 0 else ZERO
    point = tuple(column if d == anchor.dim else x for d, x in enumerate(term.at))
    return _of_row(frame, anchor, anchor.scores_at(frame.reader(), point))


def _of_row(frame: Frame, anchor: Anchor, logit: Expr) -> Expr:
    """A logit that is alike for every key, as it still can be read where the kernel runs."""
    f, held = frame.facts, loads(logit)
    if frame.c in free(logit) or any(x.tensor.startswith(DOT) for x in held):
        raise Unreadable(anchor.node, because("other-keys"))
    if any(f.writes(f.by_name[x.tensor], f.order[anchor.reader] - 1, frame.use) for x in held):
        raise Unreadable(anchor.node, because("written-before"))
    return logit


#: What gives windows of a tensor.
_WINDOWS = (torch.ops.aten.unfold.default, torch.ops.aten.im2col.default)


def _of_windows(frame: Frame, term: Term, score: Expr) -> Product | None:
    """A product of one number each, which the score does not mention: a score that is a load needs no queries and keys
    (outlook attention; Yuan et al., 2021, arXiv 2106.13112).

    The same shapes appear where a layer weighs experts or branches, so the values must be windows, where the key says
    which neighbour of the token it is."""
    n, held = term.anchor.scores, next(iter(loads(score)), None)
    windows = any(x.target in _WINDOWS for x in made_of(frame.facts, frame.values, ()))
    if held is None or not windows or any(x.tensor.startswith(DOT) for x in loads(score)):
        return None
    row = max((x for x in frame.rows if isinstance(x, Index)), key=lambda x: x.name, default=None)
    q_at, k_at = (tuple(substitute(x, {gone: ZERO}) for x in term.at) for gone in (frame.c, row or ZERO))
    return Product(held, n, n, q_at, n, k_at, row, (Index("d"), ONE), held)
