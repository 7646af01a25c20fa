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
from attncc.ir.attention import Attention, W
from attncc.ir.build import TRUE, ZERO, add
from attncc.ir.expr import ROUNDINGS, Const, Expr, Op, free, walk
from attncc.patterns.anchors import Anchor
from attncc.patterns.assemble import Lifted, Piece
from attncc.patterns.consumers import Weights
from attncc.patterns.frames import Frame
from attncc.patterns.rowsums import rows_of
from attncc.patterns.softmax import attention_of, parts_of
from attncc.patterns.terms import Term
from attncc.patterns.value import Unreadable


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
    if len(pieces) != len(read) or not _partition(anchor, pieces):
        return None
    found: list[Lifted] = []
    for frame, term in pieces:
        if not _is_linear(term.weight):
            raise Unreadable(frame.node, "a piece of a softmax whose weights are no multiple of it")
        parts = replace(parts_of(frame, term), outputs=("out", "lse"))
        rows = rows_of(parts, anchor, term.at)
        if rows is None:
            raise Unreadable(frame.node, "a piece of a softmax whose rows lie otherwise than the softmax's")
        found.append(replace(attention_of(parts, frame, term), piece=Piece(anchor.node, rows, frame.product.extent)))
    shared = zip(found, _shares(found), strict=True)
    return [replace(x, attention=_without_nan(x.attention), piece=p) for x, p in shared]


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
            raise Unreadable(s.node, "pieces of a softmax, of unknown sizes, under finite masks")
        counts.append(float(p.keys.value) if s.floor == max(floors) and isinstance(p.keys, Const) else 0.0)
    return [replace(p, share=count / sum(counts)) for p, count in zip(pieces, counts, strict=True)]


def _partition(anchor: Anchor, pieces: list[tuple[Frame, Term]]) -> bool:
    """Whether every column of the softmax belongs to one piece."""
    starts: dict[Expr, Frame] = {}
    for frame, term in pieces:
        x = term.at[anchor.dim]
        line = linear_in(x, frame.c)
        others = (y for d, y in enumerate(term.at) if d != anchor.dim)
        if line is None or line[0] != {(): 1} or any(frame.c in free(y) for y in others):
            return False
        starts[expr(line[1])] = frame
    at, count = ZERO, 0
    while (frame := next((f for start, f in starts.items() if poly(start) == poly(at)), None)) is not None:
        at, count = add(at, frame.product.extent), count + 1
        if count > len(pieces):
            return False
    columns = pieces[0][0].facts.shape(anchor.scores)[anchor.dim]
    return count == len(pieces) == len(starts) and poly(at) == poly(columns)


def _is_linear(weight: Expr) -> bool:
    """Whether a weight is `w` times something."""
    match weight:
        case Op(name, (x,)) if name in ROUNDINGS or name == "neg":
            return _is_linear(x)
        case Op("mul", (a, b)):
            return (_is_linear(a) and W not in walk(b)) or (_is_linear(b) and W not in walk(a))
        case _:
            return weight is W

