"""Dropout as a function of words of its rows: `attncc::dropped`, which the driver writes for a dropout of weights.

    dropped(w, words, p)[.., i, j] = w[.., i, j] * (1 / (1 - p) where mix(words[.., i, 0], words[.., i, 1], j) < limit)
"""

from __future__ import annotations

from torch import fx

from attncc.ir.build import const, lt, mul, op, where
from attncc.ir.expr import Expr
from attncc.ir.streams import limit_of
from attncc.patterns.reader.rules import Point, Values


def keeps(words: tuple[Expr, Expr], j: Expr, p: float) -> Expr:
    """What the weight of key `j` is multiplied with, of a row with these words."""
    return where(lt(op("mix", *words, j), const(limit_of(p))), const(1.0 / (1.0 - p)), const(0.0))


def words_at(r: Values, words: fx.Node, row: Point, reader: int | None = None) -> tuple[Expr, Expr]:
    """The two words of a row."""
    return r.value_at(words, (*row, const(0)), reader), r.value_at(words, (*row, const(1)), reader)


def dropped(r: Values, n: fx.Node, at: Point) -> Expr | None:
    """The value of `attncc::dropped` at a point."""
    weights, words, p = n.args
    if not isinstance(weights, fx.Node) or not isinstance(words, fx.Node) or not isinstance(p, float):
        return None
    use = r.facts.order[n]
    return mul(r.value_at(weights, at, use), keeps(words_at(r, words, at[:-1], use), at[-1], p))
