"""Anchors: the places where a graph normalises scores, found by what its quotients and exponentials hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from attncc.ir.analysis import unrounded
from attncc.ir.attention import Empty, W
from attncc.ir.build import ONE, ZERO
from attncc.ir.expr import Expr, Index, Load, Op, substitute
from attncc.patterns.site import (
    DOT,
    Facts,
    Frame,
    Point,
    Reader,
    Unreadable,
    argument,
    compares,
    contraction,
    framed,
    one_dim,
    op_name,
    scattered,
    skip_casts,
)
from attncc.patterns.softmax.shares import Form, Share, Total, fractions, holds_powers, share

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
#: The same with dropout that is a function of words of its rows (`attncc.patterns.reader.dropout`).
_DROPPED = "attncc::dropped_attention"
_SOFTMAXES = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default, aten.special_softmax.default)
_LOGS = (aten.log_softmax.int, aten._log_softmax.default, aten.special_log_softmax.default)
_QUOTIENTS = ("div", "divide", "true_divide", "mul", "multiply", "exp")


def calls_attention(n: fx.Node) -> bool:
    """Whether a node is a call of `scaled_dot_product_attention`, with dropout or without."""
    return n.target is SDPA or getattr(getattr(n.target, "_schema", None), "name", "") == _DROPPED


@dataclass(frozen=True)
class Anchor:
    """`node` holds normalised weights along `dim`, shares of a sum of what `scores` says as `reader` sees it: these are
    scores themselves (`form` is "scores"), or what is summed. `empty` overrides what a row of all -inf gives. `sink` is
    the logit of what the sum has beside, where the node is read `at` a point; `shifted`: what is alike for all of a
    row's scores does not cancel with it."""

    node: fx.Node
    scores: fx.Node
    dim: int
    reader: fx.Node
    form: Form | Literal["scores"] = "scores"
    empty: Empty | None = None
    at: Point = ()
    sink: Expr | None = None
    shifted: bool = False

    def scores_at(self, r: Reader, at: Point) -> Expr:
        """What the scores are at a point, as far as exponentials are summed: else what is summed. They are read where
        the weights are made of them: a later write to them changes nothing."""
        x = r.value_at(self.scores, at, r.facts.order[self.reader])
        power = unrounded(x)
        held = self.form == "powers" and isinstance(power, Op) and power.name == "exp"
        return power.children[0] if held else x

    def sink_at(self, at: Point) -> Expr | None:
        """The logit of what the sum has beside, where the weights are read at a point."""
        here: dict[Expr, Expr] = {x: y for x, y in zip(self.at, at, strict=bool(self.at)) if isinstance(x, Index)}
        return None if self.sink is None else substitute(self.sink, here)


@dataclass(frozen=True)
class Term:
    """`weight`, a function of `w`, the softmax of `anchor` read `at` a point; summed outside over `mixed`."""

    anchor: Anchor
    at: Point
    weight: Expr
    mixed: Mapping[Expr, Expr]


@dataclass(frozen=True)
class Late:
    """A product that is divided by the sum of its weights: `frame` is that of the quotient, `total` the sum, `powers`
    whether exponentials are summed, maybe some of them only."""

    frame: Frame
    term: Term
    total: fx.Node
    powers: bool


def normalisers(f: Facts) -> Iterator[Anchor | Late | fx.Node]:
    """The softmaxes of a graph, products that are divided late, and quotients that look like either, in order."""
    for n in f.graph.nodes:
        if n.op != "call_function" or not f.is_tensor(n) or f.rank(n) == 0 or not f.value(n).is_floating_point():
            continue
        if n.target in _SOFTMAXES:
            found = _softmax(f, n, n, "zero" if n.target is aten._safe_softmax.default else None)
        elif op_name(n).rstrip("_") not in _QUOTIENTS:
            continue
        elif op_name(n).rstrip("_") == "exp" and (log := skip_casts(n.args[0])) is not None and log.target in _LOGS:
            found = _softmax(f, n, log, None)
        else:
            try:
                found = _quotient(f, n)
            except Unreadable:
                continue
        if found is not None:
            yield found


def _softmax(f: Facts, n: fx.Node, reader: fx.Node, empty: Empty | None) -> Anchor | None:
    x: Any = reader.args[0]
    dim = one_dim(f, x, argument(reader, "dim"))
    return None if dim is None else Anchor(n, x, dim, reader, empty=empty)


def _quotient(f: Facts, n: fx.Node) -> Anchor | Late | fx.Node | None:
    """What a node is the quotient of: itself, where it only looks like one of a softmax. Raises Unreadable."""
    shape = f.shape(n)
    at = tuple(ZERO if s is ONE else Index(f"o{d}") for d, s in enumerate(shape))
    r = Reader(f, f.order[n], {x: s for x, s in zip(at, shape, strict=True) if x is not ZERO})
    for top, total in fractions(r, n, at):
        whole = share(r, top, total, at)
        anchor = None if whole is None else _anchor(f, n, at, total, whole)
        if anchor is not None or n not in f.live:
            return anchor
        late = _late(r, n, at, top, total)
        powers = holds_powers(f, top) or holds_powers(f, total.summed(r, Index("key")))
        along = len(total.how.inside(total.load.index, ZERO)) == len(at)
        if late is not None or (powers and along and total.how.inside(total.load.index, at[total.how.dim]) == at):
            return late or n
    grouped = n in f.live and scattered(n.args[-1]) is not None
    return n if grouped and holds_powers(f, r.value_at(n, at)) else None


def _anchor(f: Facts, n: fx.Node, at: Point, total: Total, x: Share) -> Anchor | None:
    """The anchor that a share is; other than exponentials are scores alone where they compare two tensors."""
    over = next((y for y in n.args[:2] if isinstance(y, fx.Node) and f.is_tensor(y) and f.shape(y) == f.shape(n)), None)
    exponent = op_name(n).rstrip("_") == "exp"
    if over is None or not (x.form == "powers" or compares(f, over)):
        return None
    dim = total.how.dim if x.key is ZERO else at.index(x.key)
    return Anchor(n, over, dim, n, "scores" if exponent else x.form, None, at, x.sink, x.shifted)


def _late(r: Reader, n: fx.Node, at: Point, top: Expr, total: Total) -> Late | None:
    """(exp(x) @ v) / sum(exp(x)), (f(s) @ v) / sum(f(s)): both sum over the same."""
    f, how = r.facts, total.how
    of = skip_casts(how.source)
    if not isinstance(top, Load) or not top.tensor.startswith(DOT) or of is None:
        return None
    product = contraction(f, f.by_name[top.tensor.removeprefix(DOT)])
    assert product is not None
    for left in (True, False):
        frame = framed(f, n, product, at, f.shape(n), r.extents, top.index, left=left)
        reader = frame.reader()
        x = share(reader, reader.value_at(frame.weights, frame.weights_at, frame.read), total, (frame.c,))
        if x is not None and (x.form == "powers" or (x.form == "plain" and compares(f, of))):
            point = how.inside(total.load.index, frame.c)
            anchor = Anchor(of, how.source, how.dim, how.node, x.form, None, point, x.sink, x.shifted)
            powers = holds_powers(f, total.summed(reader, frame.c))
            return Late(frame, Term(anchor, point, W, {}), how.node, powers)
    return None
