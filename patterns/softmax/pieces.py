"""One softmax whose columns several products sum, each a piece: an attention each, merged by the sums of their rows.

    sum_j w[j] v[j]  =  sum_k exp(lse_k - lse) out_k,    lse = log sum_k exp(lse_k)

Sliding windows with global columns, blocks with their neighbours and random ones, and local attention with a summary
are written so: scores concatenated, one softmax, weights sliced, products added. (The merge is that of online softmax;
Milakov and Gimelshein 2018.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from attncc.ir.affine import expr, linear_in, poly
from attncc.ir.analysis import linear_factor
from attncc.ir.attention import Attention, W
from attncc.ir.build import TRUE, ZERO, add, sub
from attncc.ir.expr import Const, Expr, Op, free, walk
from attncc.ir.reasons import because
from attncc.patterns.site import Frame, Lifted, Parts, Piece, Unreadable, rows_of
from attncc.patterns.softmax.anchors import Anchor, Term
from attncc.patterns.softmax.sliding import slid, slides
from attncc.patterns.softmax.softmax import attention_of, parts_of, parts_of_slid
from attncc.patterns.softmax.weight_users import Weights


def in_pieces(anchor: Anchor, frames: Sequence[Frame], weights: Weights) -> list[Lifted] | None:
    """The attentions that the products make of one softmax, None if their columns do not add up to it.

    Raises Unreadable where a piece is no attention."""
    try:
        read = [(frame, weights.of(frame)) for frame in frames]
    except Unreadable:
        return None
    if len(read) < 2 or any(len(terms) != 1 or terms[0].mixed for _, terms in read):
        return None
    pieces = [(frame, terms[0]) for frame, terms in read if terms[0].anchor is anchor]
    sliding = [(frame, term) for frame, term in pieces if slides(frame, term)]
    columns = frames[0].facts.shape(anchor.node)[anchor.dim]
    left = _left(anchor, columns, [piece for piece in pieces if piece not in sliding])
    if len(pieces) != len(read) or left is None or len(sliding) != (poly(left[0]) != poly(left[1])):
        return None
    found = [_slid_piece(anchor, *piece, left) if piece in sliding else _piece(anchor, *piece) for piece in pieces]
    if sliding and any(x.floor is not None for x in found):
        raise Unreadable(anchor.node, because("piece-finite-window"))
    if any(x.attention.slope for x in found):
        raise Unreadable(anchor.node, because("piece-hidden-gradients"))
    shared = zip(found, _shares(found), strict=True)
    return [replace(x, attention=_without_nan(x.attention), piece=p) for x, p in shared]


def _piece(anchor: Anchor, frame: Frame, term: Term) -> Lifted:
    return _of_parts(anchor, frame, term, parts_of(frame, term))


def _slid_piece(anchor: Anchor, frame: Frame, term: Term, left: tuple[Expr, Expr]) -> Lifted:
    """The window of keys whose columns are those that no other piece has."""
    behind = sub(frame.facts.shape(anchor.node)[anchor.dim], left[1])
    if not isinstance(left[0], Const) or not isinstance(behind, Const):
        raise Unreadable(frame.node, because("piece-window-sizes"))
    slide = slid(frame, term, int(left[0].value), int(behind.value))
    assert slide is not None  # it slides
    return _of_parts(anchor, slide.frame, slide.term, parts_of_slid(slide))


def _of_parts(anchor: Anchor, frame: Frame, term: Term, parts: Parts) -> Lifted:
    if any(isinstance(x, Op) and x.name == "stop" for x in walk(term.weight)):
        raise Unreadable(frame.node, because("piece-stopped"))
    if linear_factor(term.weight, W) is None:
        raise Unreadable(frame.node, because("piece-not-multiple"))
    parts = replace(parts, outputs=("out", "lse"))
    rows = rows_of(parts, anchor.node, anchor.dim, term.at)
    if rows is None:
        raise Unreadable(frame.node, because("piece-layout"))
    return replace(attention_of(parts, frame, term), piece=Piece(anchor.node, rows, frame.product.extent))


def _without_nan(a: Attention) -> Attention:
    """An empty row of one piece counts for nothing."""
    return replace(a, empty="zero") if a.empty == "nan" else a


def _shares(sites: list[Lifted]) -> list[Piece]:
    """The pieces with what each counts for in a row that sees no key in any of them: such a row is the mean of the
    values under the highest fill."""
    pieces = [s.piece for s in sites if s.piece is not None]
    kinds = {s.attention.empty for s in sites}
    floors = [s.floor for s in sites if s.floor is not None]
    if any(s.attention.mask is TRUE for s in sites):  # there is no such row
        return pieces
    if not floors:
        return [replace(p, share=float("nan") if "nan" in kinds else 0.0) for p in pieces]
    counts: list[float] = []
    for p, s in zip(pieces, sites, strict=True):
        if s.floor == max(floors) and not isinstance(p.keys, Const):
            raise Unreadable(s.node, because("piece-sizes"))
        counts.append(float(p.keys.value) if s.floor == max(floors) and isinstance(p.keys, Const) else 0.0)
    return [replace(p, share=count / sum(counts)) for p, count in zip(pieces, counts, strict=True)]


def _left(anchor: Anchor, columns: Expr, pieces: Sequence[tuple[Frame, Term]]) -> tuple[Expr, Expr] | None:
    """The first of the columns of the softmax that belong to none of the pieces, and the one behind the last of them;
    None where the others do not belong to one piece each."""
    spans: list[tuple[Expr, Expr]] = []
    for frame, term in pieces:
        x = term.at[anchor.dim]
        line = linear_in(x, frame.c)
        others = (y for d, y in enumerate(term.at) if d != anchor.dim)
        if line is None or line[0] != {(): 1} or any(frame.c in free(y) for y in others):
            return None
        spans.append((expr(line[1]), add(expr(line[1]), frame.product.extent)))
    start, end = ZERO, columns
    while (span := next((s for s in spans if poly(s[0]) == poly(start)), None)) is not None:
        spans.remove(span)
        start = span[1]
    while (span := next((s for s in spans if poly(s[1]) == poly(end)), None)) is not None:
        spans.remove(span)
        end = span[0]
    return None if spans else (start, end)
