"""Guards against rows that see nothing: what models write around a softmax so that its NaN becomes zero.

    nan_to_num(softmax(x), 0)            where(any(mask), softmax(x), 0)            softmax(x) * any(mask)
    where(mask, softmax(where(mask, x, -inf)), 0)            where(all(x == -inf), 0, softmax(x))

Each says `empty: zero`; the guard itself then has nothing left to do. The second is one only if what it asks about is
the very mask of the scores, which is looked up in the graph; so is the fourth, where it is there already. The last is
what torch makes of `scaled_dot_product_attention` where a graph is decomposed; it must ask for the very scores.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attncc.ir.attention import W
from attncc.ir.build import TRUE, not_
from attncc.ir.expr import Const, Expr, Load, Op
from attncc.ir.gradients import bounded
from attncc.patterns.site import CASTS, Facts, Point, Reader, alike, argument, is_maximum, one_dim, op_name, split_mask
from attncc.patterns.softmax.sums_of_softmaxes import Term

aten = torch.ops.aten


def unguarded(f: Facts, reader: Reader, term: Term, weight: Expr, score: Expr, key: Expr) -> Expr | None:
    """`weight` without its guard, or None if it has none. `key` is the index of the keys in `score`."""
    match weight:
        case Op("where", (Op("isnan", (inner,)), Const(0.0), rest)) if _in_unit_range(rest) is inner is W:
            return W
        case Op("where", (some, inner, Const(0.0))):
            guard = _Guard(f, reader, term, score, key)
            return inner if guard.some_key(some) else None
        case Op("where", (none, Const(0.0), inner)):
            guard = _Guard(f, reader, term, score, key)
            return inner if guard.no_key(none) else None
        case _:
            return None


def masked_again(weight: Expr, score: Expr, *, half: bool) -> Expr | None:
    """`weight` without a choice of zero for the keys that the mask of `score` hides; None if it makes none.

    Such rows as see nothing then are zero, be the mask's fill finite or not; a product with zero leaves a NaN one."""
    masked = split_mask(score, half=half, infinite_empty="nan")
    match weight:
        case Op("where", (shown, inner, Const(0.0))):
            visible = shown
        case Op("where", (hidden, Const(0.0), inner)):
            visible = not_(hidden)
        case Op("mul", (inner, Op("where", (shown, Const(1.0), Const(0.0))))) if masked.empty != "nan":
            visible = shown
        case _:
            return None
    return inner if visible is masked.mask and visible is not TRUE else None


def _in_unit_range(x: Expr) -> Expr:
    """`x` without clamps that a weight between 0 and 1 never meets."""
    while (found := bounded(x)) is not None:
        name, inner, limit, _ = found
        if limit.value < 1 if name == "min" else limit.value > 0:
            break
        x = inner
    return x


@dataclass(frozen=True)
class _Guard:
    """What is asked of the keys of a row: whether there is one that its softmax sees."""

    facts: Facts
    reader: Reader
    term: Term
    score: Expr
    key: Expr

    def some_key(self, x: Expr) -> bool:
        match x:
            case Op("not", (inner,)):
                return self.no_key(inner)
            case Load():
                return self._asks(x, aten.any.dim, hidden=False)
            case _:
                return False

    def no_key(self, x: Expr) -> bool:
        match x:
            case Op("not", (inner,)):
                return self.some_key(inner)
            case Op("eq", (Load() as most, Const(value))) if value == -math.inf:
                return self._is_maximum(most)
            case Load():
                return self._asks(x, aten.all.dim, hidden=True)
            case _:
                return False

    def _asks(self, load: Load, target: object, *, hidden: bool) -> bool:
        """Whether `load` reads any(..) or all(..) over the keys, of what says which of them are visible, or hidden."""
        f, n = self.facts, self.facts.by_name.get(load.tensor)
        source, dim = (n.args[0], argument(n, "dim")) if n is not None and n.target is target else (None, None)
        if n is None or not isinstance(source, fx.Node) or not isinstance(dim, int):
            return False
        dim %= f.rank(source)
        point = self._row(load, bool(argument(n, "keepdim")), dim)
        if self._compares(source, n, point, dim, hidden=hidden):
            return True
        mask = split_mask(self.score, half=f.dtype(n) == torch.float16, infinite_empty="nan").mask
        value = self.reader.value_at(source, point, f.order[n])
        return mask is not TRUE and (not_(value) if hidden else value) is mask

    def _compares(self, n: fx.Node, when: fx.Node, at: Point, dim: int, *, hidden: bool) -> bool:
        """Whether `n` says of each score whether it is -inf (`hidden`), or whether it is not."""
        if op_name(n) in ("logical_not", "bitwise_not"):
            return self._compares(n.all_input_nodes[0], n, at, dim, hidden=not hidden)
        limit: Any = n.args[1] if len(n.args) > 1 else -math.inf
        found = (op_name(n) in (("eq", "isneginf", "isinf") if hidden else ("ne", "gt"))) and limit == -math.inf
        return found and self._is_scores(n.all_input_nodes[0], n, at, dim)

    def _is_maximum(self, load: Load) -> bool:
        n = self.facts.by_name.get(load.tensor)
        if n is None or not is_maximum(n):
            return False
        n = n.all_input_nodes[0] if n.target is operator.getitem else n
        source = n.all_input_nodes[0]
        dim = one_dim(self.facts, source, argument(n, "dim"))
        return dim is not None and self._is_scores(source, n, self._row(load, bool(argument(n, "keepdim")), dim), dim)

    def _is_scores(self, n: fx.Node, reader: fx.Node, at: Point, dim: int) -> bool:
        """Whether `n` as `reader` sees it, at a point, are the scores of the softmax."""
        f, anchor = self.facts, self.term.anchor
        rows = all(x is y for d, (x, y) in enumerate(zip(at, self.term.at, strict=True)) if d != dim)
        scores, seen = anchor.scores, anchor.reader or anchor.node
        while scores is not n and scores.target in CASTS and _widens(f, scores):
            scores, seen = scores.all_input_nodes[0], scores
        return dim == anchor.dim and rows and alike(f, n, reader, scores, seen)

    def _row(self, load: Load, kept: bool, dim: int) -> Point:
        """Where what reduces a dimension to `load` is read."""
        return (*load.index[:dim], self.key, *load.index[dim + kept :])


def _widens(f: Facts, cast: fx.Node) -> bool:
    return torch.promote_types(f.dtype(cast.all_input_nodes[0]), f.dtype(cast)) is f.dtype(cast)
