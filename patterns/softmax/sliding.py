"""Sliding windows in chunks (Longformer; Beltagy et al., 2020, arXiv 2004.05150): a softmax over columns, of which
column t of row i is key i + t - w, whose weights are skewed before they meet chunks of values that overlap.

    out[i] = sum_c skewed[i, c] * v[chunk(i) + c],    skewed[i, c] = p[i, c - shift(i)] where that is a column, else 0
           = sum_t p[i, t] * v[i + t + offset]
           = sum_j softmax_j(score(i, j - i - offset) where j - i - offset is a column) * v[j]

The change of variable from columns to keys is made where it is proven: each column is a key of its own for every row,
and columns whose key is outside of the sequence are hidden. It needs no more than that each of them is a linear index;
how the model skews (by padding and reshaping, by strides) and how it puts its scores together (by writing into parts
of a tensor) is read as index arithmetic, and simplified where the conditions of each part hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Any

import torch
from torch import fx

from attncc.ir.affine import expr, less_than, linear_in, nonnegative, plus, poly, simplify
from attncc.ir.attention import S
from attncc.ir.build import NEG_INF, ONE, TRUE, ZERO, add, and_, const, eq, floordiv, ge, le, lt, mod, mul, sub, where
from attncc.ir.expr import Const, Expr, Index, Load, Op, Size, free, loads, rewrite, substitute, walk
from attncc.ir.reasons import because
from attncc.patterns.site import (
    DOT,
    Context,
    Contraction,
    Facts,
    Frame,
    Move,
    Place,
    Point,
    Product,
    Reach,
    Reader,
    Unreadable,
    argument,
    contraction,
    has_argument,
    hidden_by,
    move,
    of_scores,
    scaled_by,
    stops,
    visible_where,
)
from attncc.patterns.softmax.anchors import Term

_PADS = (torch.ops.aten.pad.default, torch.ops.aten.constant_pad_nd.default)
_COLUMN, _ROW, _KEY, _DEPTH = Index("t"), Index("row"), Index("key"), Index("d")


@dataclass(frozen=True)
class Slid:
    """The same attention over the rows and keys of the whole sequence: `found` is its product of queries and keys, and
    `score` its score, -inf outside of the window."""

    frame: Frame
    term: Term
    score: Expr
    found: Product


def slid(frame: Frame, term: Term, first: int = 0, behind: int = 0) -> Slid | None:
    """An attention whose weights are selected by the place of the key in its row, over whole rows and keys; None for
    all others. The `first` columns of the softmax and those `behind` are not its own. Raises Unreadable where something
    that this needs is not proven."""
    return _Slide(frame, term, first, behind).slid() if slides(frame, term) else None


def slides(frame: Frame, term: Term) -> bool:
    guards, _ = _selected(term.weight, frame.c)
    line = linear_in(term.at[term.anchor.dim], frame.c)
    fixed = line is not None and set(line[1]) <= {()}  # a plain column: the conditions are a weight like any other
    return not fixed and bool(guards) and not term.mixed


def _selected(weight: Expr, c: Index) -> tuple[list[Expr], Expr]:
    """(conditions, rest) of a weight that is zero where conditions on the key and other indices are not met."""
    guards: list[Expr] = []
    while isinstance(weight, Op) and weight.name == "where":
        condition, yes, no = weight.args
        if c not in free(condition) or loads(condition) or no is not Const(0.0):
            break
        guards.append(condition)
        weight = yes
    return guards, weight


@dataclass(frozen=True)
class _Position:
    """Dimension `dim` of `node` read at `at` is `rows`, as one index, + t + `offset`."""

    node: fx.Node
    at: Point
    dim: int
    rows: tuple[Index, ...]
    offset: Expr


class _Slide:
    def __init__(self, frame: Frame, term: Term, first: int, behind: int) -> None:
        self.frame, self.term, self.f = frame, term, frame.facts
        guards, weight = _selected(term.weight, frame.c)
        reach, context, dim = Reach(frame.extents), tuple(guards), term.anchor.dim
        at = [reach.simplified(x, context) for x in term.at]
        self.columns = sub(self.f.shape(term.anchor.node)[dim], const(first + behind))
        line = linear_in(at[dim], frame.c)
        if line is None or line[0] != {(): 1} or any(frame.c in free(x) for d, x in enumerate(at) if d != dim):
            raise Unreadable(term.anchor.node, because("other-axis"))
        own = {x: s for x, s in frame.extents.items() if x is not frame.c}
        self.extents: dict[Expr, Expr] = {**own, _COLUMN: self.columns}
        self.reach = Reach(self.extents)
        place = sub(add(_COLUMN, const(first)), expr(line[1]))  # where column t is among what the product sums over
        met = (substitute(g, {frame.c: place}) for g in guards)
        covered = and_(ge(place, ZERO), lt(place, frame.product.extent), *met)
        below = and_(ge(at[dim], const(first)), lt(at[dim], add(self.columns, const(first))))
        if not self.reach.proves((), simplify(covered, self.extents)) or not reach.proves(context, below):
            raise Unreadable(term.anchor.node, because("other-keys"))
        self.by_column: dict[Expr, Expr] = {frame.c: place}
        self.at = tuple(self._of_column(x) for x in at)
        self.weight = self._of_column(reach.simplified(weight, context))

    def _of_column(self, x: Expr) -> Expr:
        return simplify(substitute(x, self.by_column), self.extents)

    def slid(self) -> Slid:
        p = self.values
        key, keys = self.key, self.f.shape(p.node)[p.dim]
        score, found = self._score((ge(key, ZERO), lt(key, keys)))
        for beyond in (lt(key, ZERO), ge(key, keys)):
            if self.reach.possible((beyond,)):
                self._check_hidden(self._read((beyond,)), score)
        first = add(_ROW, p.offset)
        window = and_(le(first, _KEY), lt(_KEY, add(first, self.columns)))
        return Slid(
            self._whole_frame(keys), replace(self.term, at=self._points(self.at), weight=self._whole(self.weight)),
            where(simplify(window, self.whole), self._whole(score), NEG_INF), found,
        )  # fmt: skip

    def _check_hidden(self, beyond: Expr, score: Expr) -> None:
        """Raises where a column whose key is outside of the sequence could be given weight: one that is filled with a
        finite number is given none in a row that sees a key."""
        f, scores = self.f, self.term.anchor.scores
        fill = hidden_by(beyond, half=f.dtype(scores) == torch.float16)
        if fill is None:
            raise Unreadable(self.term.anchor.node, because("window-outside"))
        if fill == -math.inf:
            return
        visible = visible_where(score, fill, half=f.dtype(scores) == torch.float16)
        row, keys = self.flat(self.values.rows), self.f.shape(self.values.node)[self.values.dim]
        own = simplify(add(sub(row, self.key), _COLUMN), self.extents)  # the column of the key in the row's own place
        placed = and_(ge(own, ZERO), lt(own, self.columns), lt(row, keys))
        sees = None if visible is None else simplify(and_(placed, substitute(visible, {_COLUMN: own})), self.extents)
        if sees is None or not self.reach.proves((), sees):
            raise Unreadable(self.term.anchor.node, because("window-empty-row"))

    def _read(self, context: Context) -> Expr:
        """The scores of columns of which the conditions are known."""
        anchor, pair = self.term.anchor, frozenset[Expr]({_COLUMN, self.values.rows[-1]})
        reader = Reader(self.f, self.frame.use, dict(self.extents), pair=pair, reach=self.reach, context=context)
        score, self.lost = anchor.scores_at(reader, self.at), reader.lost
        return score

    def _score(self, context: Context) -> tuple[Expr, Product]:
        """The score with the product of queries and keys as `s`, and that product."""
        scores, same = self.term.anchor.scores, _Same(self)
        score = self.reach.simplified(self._read(context), context, same)
        found = same.found
        if found is None:
            raise self.lost or Unreadable(scores, of_scores(self.f, scores))
        if any(x.tensor == found.load.tensor for x in loads(score)):
            raise Unreadable(scores, because("scores-of-several-products"))
        return score, found

    @property
    def key(self) -> Expr:
        """The index of the key that a column is."""
        return self.values.at[self.values.dim]

    @cached_property
    def values(self) -> _Position:
        """Where the values are read: below a pad that makes room at the ends of the sequence, if there is one."""
        n, at = self.frame.values, tuple(self._of_column(x) for x in self.frame.values_at)
        best: _Position | None = None
        for step in _chain(self.f, n, at, self.extents, self.frame.use):
            plain = step.scale == 1.0 and (best is None or step.padded)
            best = (self._position(step.node, step.at) if plain else None) or best
        if best is None:
            raise Unreadable(n, because("window-values"))
        return best

    def _position(self, n: fx.Node, at: Point) -> _Position | None:
        moving = [d for d, x in enumerate(at) if _COLUMN in free(x)]
        line = linear_in(at[moving[0]], _COLUMN) if len(moving) == 1 else None
        if line is None or line[0] != {(): 1}:
            return None
        outs = [x for x in self.frame.out if isinstance(x, Index)]
        rows = [x for x in outs if any(x in free(y) for m in line[1] for y in m)]
        first = outs.index(rows[0]) if rows else 0
        offset = plus(line[1], poly(self.flat(rows)), -1)
        together = bool(rows) and rows == outs[first : first + len(rows)]
        if not together or not all(isinstance(y, Size) for m in offset for y in m):
            return None
        return _Position(n, at, moving[0], tuple(rows), expr(offset))

    def flat(self, rows: Sequence[Index]) -> Expr:
        return reduce(lambda i, x: add(mul(i, self.extents[x]), x), rows, ZERO)

    @cached_property
    def whole(self) -> dict[Expr, Expr]:
        """The extents of the indices that the result has."""
        p = self.values
        rows = reduce(mul, (self.extents[x] for x in p.rows))
        kept = {x: s for x, s in self.extents.items() if x is not _COLUMN and x not in p.rows}
        return {**kept, _ROW: rows, _KEY: self.f.shape(p.node)[p.dim]}

    @cached_property
    def _digits(self) -> dict[Expr, Expr]:
        """What rows in chunks, and columns, are of whole rows and keys."""
        p = self.values
        table: dict[Expr, Expr] = {_COLUMN: sub(sub(_KEY, _ROW), p.offset)}
        left: Expr = _ROW
        for x in reversed(p.rows[1:]):
            table[x], left = mod(left, self.extents[x]), floordiv(left, self.extents[x])
        return {**table, p.rows[0]: left}

    def _point(self, x: Expr) -> Expr:
        return simplify(substitute(x, self._digits), self.whole)

    def _points(self, at: Point) -> Point:
        return tuple(self._point(x) for x in at)

    def _whole(self, x: Expr) -> Expr:
        """An expression over whole rows and keys, whose loads stay inside of their tensors beyond the window too."""

        def kept(y: Expr) -> Expr | None:
            if not isinstance(y, Load):
                return None
            shape = self.f.shape(self.f.by_name[y.tensor.removeprefix(DOT)])
            return Load(y.tensor, Place(TRUE, y.index).kept(shape, self.whole), y.kind)

        return rewrite(self._point(x), kept)

    def _whole_frame(self, keys: Expr) -> Frame:
        frame, p = self.frame, self.values
        first = frame.out.index(p.rows[0])
        last = frame.out.index(p.rows[-1])
        return replace(
            frame, product=replace(frame.product, extent=keys), c=_KEY, extents=self.whole,
            out=(*frame.out[:first], _ROW, *frame.out[last + 1 :]),
            shape=(*frame.shape[:first], self.whole[_ROW], *frame.shape[last + 1 :]),
            weights_at=(*(x for x in frame.out if x in free(*frame.weights_at) and x not in p.rows), _ROW, _KEY),
            values=p.node, values_at=self._points(p.at),
        )  # fmt: skip

    def known(self, context: Context, extents: dict[Expr, Expr]) -> Callable[[Expr], Expr]:
        """Simplifies where the conditions hold."""
        return lambda x: simplify(self.reach.simplified(x, context), extents)

    def digits_of(self, at: Point, extents: Mapping[Expr, Expr]) -> Point:
        """A point over rows in chunks and columns as one over whole rows and keys."""
        bounds = {**self.whole, **{x: s for x, s in extents.items() if x not in self.extents}}
        return tuple(simplify(substitute(x, self._digits), bounds) for x in at)


class _Same:
    """Recognises the product of queries and keys wherever it is read, as `s`: several places in a tensor of scores may
    hold the same row and key. `found` is the first that is of one row and one key."""

    def __init__(self, slide: _Slide) -> None:
        self.slide = slide
        self.found: Product | None = None
        self.read: list[_Step] = []  # where each side is read, over rows in chunks and columns

    def __call__(self, x: Load, context: Context) -> Expr | None:
        plain = Load(x.tensor, self._plain(self.slide.f.by_name[x.tensor.removeprefix(DOT)], x.index, context), x.kind)
        if not x.tensor.startswith(DOT):
            return plain
        product = contraction(self.slide.f, self.slide.f.by_name[x.tensor.removeprefix(DOT)])
        assert product is not None
        if self.found is None:
            self.found = self._product(x, product, context)
        if self.found is None or x.tensor != self.found.load.tensor:
            return plain
        pairs: list[tuple[Expr, Expr]] = []
        for side, chain in zip(self.read, self._chains(x, product, context), strict=True):
            pairs += zip(side.at, next(step.at for step in chain if step.node is side.node), strict=True)
        same = all(a is b or self.slide.reach.proves(context, eq(a, b)) for a, b in pairs)
        return self.found.value if same else plain

    def _product(self, x: Load, product: Contraction, context: Context) -> Product | None:
        """The product of one row and one key that is read in a context, None if it is of more."""
        extents: dict[Expr, Expr] = {_DEPTH: product.extent}
        read: list[_Step] = []
        whole: list[tuple[fx.Node, Point]] = []
        for chain in self._chains(x, product, context):
            options = [(step, self.slide.digits_of(step.at, extents)) for step in chain]
            options = [(step, at) for step, at in options if self._is_inside(step.node, at)]
            if not options:
                return None
            step, at = min(options, key=lambda option: _effort(option[1]))
            read.append(step)
            whole.append((step.node, at))
        keyed = [_KEY in free(*at) for _, at in whole]
        if sum(keyed) != 1:
            return None
        (k, k_at), (q, q_at) = whole if keyed[0] else reversed(whole)
        if _ROW not in free(*q_at) or _ROW in free(*k_at):
            return None
        self.read = read
        scaled = mul(S, const(math.prod(step.scale for step in read)))
        return Product(x, product.node, q, q_at, k, k_at, _ROW, (_DEPTH, product.extent), scaled)

    def _chains(self, x: Load, product: Contraction, context: Context) -> list[list[_Step]]:
        """The tensors that both factors come from, and where each is read."""
        slide = self.slide
        extents = {**slide.extents, _DEPTH: product.extent}
        known = slide.known(context, extents)
        sides = zip((product.lhs, product.rhs), product.maps(x.index, _DEPTH), strict=True)
        return [
            [replace(step, at=self._plain(step.node, step.at, context))
             for step in _chain(slide.f, n, at, extents, slide.frame.use, known)]
            for n, at in sides
        ]  # fmt: skip

    def _plain(self, n: fx.Node, at: Point, context: Context) -> Point:
        """A point with the index of the key, or of the row, wherever it is that."""
        slide = self.slide
        key, row = slide.key, slide.flat(slide.values.rows)
        own = {_COLUMN, *slide.values.rows}

        def plain(x: Expr, length: Expr) -> Expr:
            if length is ONE or not (isinstance(x, Const) or free(x) & own):
                return x
            known = (key, row) if _COLUMN in free(x) else (row, key)  # a context may be of the diagonal alone
            return x if x in known else next((y for y in known if slide.reach.proves(context, eq(x, y))), x)

        return tuple(plain(x, s) for x, s in zip(at, slide.f.shape(n), strict=True))

    def _is_inside(self, n: fx.Node, at: Point) -> bool:
        """Whether all rows and keys are in a tensor."""
        whole = self.slide.whole
        own = [(x, s) for x, s in zip(at, self.slide.f.shape(n), strict=True) if free(x) & {_ROW, _KEY}]
        return all(nonnegative(x, whole) and less_than(x, s, whole) for x, s in own)


@dataclass(frozen=True)
class _Step:
    """A value is `node[at] * scale`; `padded`: the node is just below a pad, where the index may lie outside."""

    node: fx.Node
    at: Point
    scale: float = 1.0
    padded: bool = False


def _chain(
    f: Facts, n: fx.Node, at: Point, extents: dict[Expr, Expr], use: int, known: Callable[[Expr], Expr] | None = None
) -> Iterator[_Step]:
    """The tensors that a value comes from, moved or scaled by a number, as far as they hold the same until `use`.
    `known` simplifies an index."""
    step = _Step(n, at)
    while True:
        yield step
        n, at, scale = step.node, step.at, step.scale
        padded = n.target in _PADS
        found = _below_pad(f, n, at, extents) if padded else move(f, n, at, extents, crossing=True)
        if found is None and (factor := scaled_by(n)) is not None:
            found, scale = (n.all_input_nodes[0], at), scale * factor
        if found is None or f.dtype(found[0]) != f.dtype(n) or f.writes(found[0], f.order[n], use):
            return
        if f.wants_grad(use) and stops(f, n, found[0]):
            return
        n, at = found
        step = _Step(n, at if known is None else tuple(map(known, at)), scale, padded)


def _effort(at: Point) -> tuple[int, int]:
    """Operations in an index, those on rows and keys first."""
    ops = [x for x in walk(*at) if isinstance(x, Op)]
    return sum(bool(free(x) & {_ROW, _KEY}) for x in ops), len(ops)


def _below_pad(f: Facts, n: fx.Node, at: Point, extents: dict[Expr, Expr]) -> Move | None:
    """Where the element comes from, if it was not filled in."""
    pads: Any = argument(n, "pad")
    if has_argument(n, "mode") and argument(n, "mode") != "constant":
        return None
    point = list(at)
    for pair in range(len(pads) // 2):
        point[-1 - pair] = simplify(sub(point[-1 - pair], f.size(pads[2 * pair])), extents)
    return n.all_input_nodes[0], tuple(point)
