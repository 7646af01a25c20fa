"""Guards against rows that see nothing: what models write around a softmax so that its NaN becomes zero.

    nan_to_num(softmax(x), 0)            where(any(mask), softmax(x), 0)            softmax(x) * any(mask)
    where(sum(mask) > 0, softmax(x), 0)
    where(mask, softmax(where(mask, x, -inf)), 0)            where(all(x == -inf), 0, softmax(x))

Each says `empty: zero`; the guard itself then has nothing left to do. The second is one only if what it asks about is
the very mask of the scores, which is looked up in the graph; so is the fourth, where it is there already. The last is
what torch makes of `scaled_dot_product_attention` where a graph is decomposed; it must ask for the very scores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from attncc.ir.analysis import keeps_nan, unrounded, zero_unless
from attncc.ir.attention import Attention, S, W
from attncc.ir.build import TRUE, ZERO, and_, const, eq, mul, not_, op, or_, where
from attncc.ir.expr import Const, Expr, Load, Op, mentions
from attncc.ir.gradients import bounded
from attncc.patterns.site import Reader, split_mask, truth
from attncc.patterns.softmax.anchors import Term


def unguarded(reader: Reader, term: Term, weight: Expr, score: Expr, key: Expr) -> Expr | None:
    """`weight` without its guard, or None if it has none. `key` is the index of the keys in `score`."""
    row = _Row(reader, term, score, key)
    match weight:
        case Op("where", (Op("isnan", (inner,)), Const(0.0), rest)) if _in_unit_range(rest) is inner is W:
            return W
        case _:
            kept = zero_unless(weight)
            return None if kept is None or not row.sees(kept[0]) else kept[1]


def masked_again(weight: Expr, score: Expr, *, half: bool) -> Expr | None:
    """`weight` without a choice of zero for the keys that the mask of `score` hides; None if it makes none.

    Such rows as see nothing then are zero, be the mask's fill finite or not; a product with zero leaves a NaN one."""
    masked = split_mask(score, half=half, infinite_empty="nan")
    visible, inner = zero_unless(weight, products=masked.empty != "nan") or (TRUE, weight)
    return inner if visible is masked.mask and visible is not TRUE else None


def zeroed_rows(a: Attention) -> Attention:
    """An attention whose weights are zero in rows that a condition chooses, and NaN in others that see nothing, in a
    form that has one value for such rows: a row of zeros sees its first key alone, by a score of zero.

        where(c_i, softmax(x where m), 0)  =  softmax(where(c_i, x, 0) where (c_i ? m : j = 0)) * (c_i ? 1 : 0)"""
    kept = zero_unless(a.weight)
    if kept is None or a.empty != "nan" or a.normalizer != "softmax" or a.sink is not None or a.outputs != ("out",):
        return a
    lives, weight = kept
    if any(mentions(lives, x) for x in (S, W, a.j.index)) or not keeps_nan(weight, W):
        return a
    first = or_(and_(lives, a.mask), and_(not_(lives), eq(a.j.index, ZERO)))
    score, share = where(lives, a.score, const(0.0)), where(lives, const(1.0), const(0.0))
    return replace(a, score=score, mask=first, weight=mul(weight, share))


def _in_unit_range(x: Expr) -> Expr:
    """`x` without clamps that a weight between 0 and 1 never meets."""
    while (found := bounded(x)) is not None:
        name, inner, limit, _ = found
        if limit.value < 1 if name == "min" else limit.value > 0:
            break
        x = inner
    return x


@dataclass(frozen=True)
class _Row:
    """What may be asked of the keys of a row: whether there is one that its softmax sees."""

    reader: Reader
    term: Term
    score: Expr
    key: Expr

    def sees(self, x: Expr) -> bool:
        match x:
            case Op("not", (Load() as every,)):
                hidden = self.reader.reduced(every, self.key, "all")
                return hidden is not None and self._shows(not_(hidden))
            case Op("ne", (most, Const(value))) | Op("lt", (Const(value), most)) if value == -math.inf:
                return self.reader.reduced(most, self.key, "max") is self._scores
            case Op("not", (Op("eq", (count, Const(0))),)) | Op("ne", (count, Const(0))) | Op("lt", (Const(0), count)):
                return self._counts(count)
            case Op("le", (Const(1), count)):
                return self._counts(count)
            case _:
                shown = self.reader.reduced(x, self.key, "any")
                return shown is not None and self._shows(shown)

    def _counts(self, x: Expr) -> bool:
        """Whether a number is how many keys the row sees, or the largest of as many ones."""
        found = (self.reader.reduced(x, self.key, op) for op in ("sum", "max"))
        truths = (truth(unrounded(y)) for y in found if y is not None)
        return any(y is not None and self._shows(y) for y in truths)

    def _shows(self, x: Expr) -> bool:
        """Whether a predicate is the mask of a score, or says that it is not -inf."""
        match x:
            case Op("ne", (a, Const(value))) | Op("lt", (Const(value), a)) if math.isinf(value):
                return a is (self._scores if value < 0 else op("abs", self._scores))
            case _:
                return x is not TRUE and x is split_mask(self.score, half=False, infinite_empty="nan").mask

    @property
    def _scores(self) -> Expr:
        return self.term.anchor.scores_at(self.reader, self.term.at)
