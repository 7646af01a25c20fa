"""A sample of rows: the weights of the last rows of a call, and their sums over columns and diagonals.

    columns(j)   = sum over the sample of w(i, j)          diagonals(o) = sum over the sample of w(i, row(i) - o)

The weights are those of the model: its score, biases and caps included, and its mask.
"""

from __future__ import annotations

from functools import cached_property

from attncc.ir import Attention, Const, Expr, Load
from attncc.ir.build import ONE, TRUE, ZERO, add, and_, floordiv, le, maximum, minimum, sub
from attncc.ir.expr import substitute
from attncc.ir.reasons import Reason, because
from attncc.passes.policies.blocks import Blocks, no_blocks
from attncc.passes.policies.making import Value, reduced, scored
from attncc.passes.policies.places import places


def no_diagonals(a: Attention) -> Reason | None:
    """Why rows of an attention have no diagonals of keys before them, or None."""
    at = places(a)
    if at is None or not at.causal:
        return because("policy-not-causal")
    return no_blocks(a)


class Sample:
    """The last `rows` rows of an attention whose blocks are `b`."""

    def __init__(self, b: Blocks, rows: int) -> None:
        a, site = b.a, b.site
        self.b = b
        n = a.i.extent
        known = isinstance(n, Const)
        self.rows = site.axis("r", Const(min(rows, int(n.value)) if known else rows))
        at = add(self.rows.index, sub(n, self.rows.extent))
        self.row = at if known else maximum(at, ZERO)
        self.there = and_(TRUE if known else le(ZERO, at), b.counts(self.row))
        self.offsets = site.axis("o", a.j.extent)
        self.last = b.position(sub(n, ONE))  # the position of the last row

    def of_rows(self, x: Expr) -> Expr:
        return substitute(x, {self.b.a.i.index: self.row})

    @cached_property
    def weights(self) -> Value:
        """(.., r, j)."""
        a, site = self.b.a, self.b.site
        q, k = (Load(x.tensor, x.index, "float") for x in (a.q, a.k))
        seen = and_(self.of_rows(a.mask), self.there)
        score = self.of_rows(a.score)
        return scored(site, "sample", self.rows, a.j, a.d, self.of_rows(q), k, score, self.b.simple(seen))

    @cached_property
    def columns(self) -> Value:
        """(.., j): what the rows of the sample give each key."""
        b = self.b
        return reduced(b.site, "columns", (b.a.j,), self.rows, "sum", self.weights(self.rows.index, b.a.j.index))

    @cached_property
    def diagonals(self) -> Value:
        """(.., o): what they give the keys that stand o before them."""
        b = self.b
        key = sub(add(self.of_rows(b.position(b.a.i.index)), b.start), self.offsets.index)
        value = self.weights(self.rows.index, minimum(maximum(key, ZERO), sub(b.a.j.extent, ONE)))
        return reduced(b.site, "diagonals", (self.offsets,), self.rows, "sum", value, le(ZERO, key))

    @property
    def open_columns(self) -> Expr:
        """Whether key j is one of the sequence."""
        return self.b.seen(self.b.a.j.index)

    @property
    def open_diagonals(self) -> Expr:
        """Whether the last row has a key that stands o before it."""
        return le(self.offsets.index, self.last)


def block_of_diagonal(b: Blocks) -> Expr:
    """How many blocks the block of key j stands before that of row i, both counted from the start of the sequence."""
    rows = add(b.of_row(b.a.i.index), floordiv(b.offset, Const(b.rows)))
    keys = sub(b.of_key(b.a.j.index), b.base)
    return sub(rows, keys)


