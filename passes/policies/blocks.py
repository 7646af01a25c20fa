"""Blocks of rows and of keys, laid on the positions of a sequence: what selections per call are written in.

    block of row i  =  (i + shift) // rows            block of key j  =  (j + shift') // keys

The shifts make blocks begin where the sequence does, at its first key, so that padding before it changes nothing; a
call of some rows of a longer sequence (a cache, a part of a prefill) has the blocks that the whole has. What the mask
of the model hides is outside of every block: it counts in no mean, and a block without a visible key is not open.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from attncc.ir import Access, Attention, Axis, Const, Expr, Load, S
from attncc.ir.affine import nonnegative, simplify
from attncc.ir.analysis import blocks_of, members
from attncc.ir.attention import W
from attncc.ir.bounds import TILE_HI, TILE_LO, Bounds, RowBound
from attncc.ir.build import (
    FALSE,
    ONE,
    TRUE,
    ZERO,
    add,
    and_,
    const,
    floordiv,
    gt,
    le,
    lt,
    maximum,
    minimum,
    mod,
    mul,
    or_,
    sub,
)  # fmt: skip
from attncc.ir.expr import free, loads, mentions, substitute
from attncc.ir.reasons import Reason, because
from attncc.ir.reduce import Reduction
from attncc.passes.bounds.bounds import loop_bounds
from attncc.passes.policies.making import Value, known, reduced
from attncc.passes.policies.places import bounds_rows, heads_of

if TYPE_CHECKING:
    from attncc.passes.policies.hiding import Hiding


#: A function of a component of a token and of its number.
OfToken = Callable[[Expr, Expr], Expr]


def no_blocks(a: Attention) -> Reason | None:
    """Why nothing can be selected for blocks of an attention, or None."""
    if a.normalizer != "softmax" or a.weight is not W:
        return because("policy-no-softmax")
    if not isinstance(a.d.extent, Const):
        return because("policy-no-width")
    parts = [x for x in members("and", a.mask) if loads(x) and mentions(x, a.j.index) and not bounds_rows(x, a)]
    return because("policy-by-pair") if any(mentions(x, a.i.index) for x in parts) else None


class Blocks:
    """The blocks of one attention. `I` and `J` are the axes of blocks of rows and of keys."""

    def __init__(self, site: Hiding, rows: int, keys: int) -> None:
        self.site, self.rows, self.keys = site, rows, keys
        self.a = a = site.attention
        self._axes: tuple[Axis, ...] = ()
        self._made_rows: dict[str, Value] = {}
        self.start: Expr = site.ends.get("start", ZERO)
        self.offset = self._offset()  # of positions against rows
        self.shift = _remainder(self.offset, rows)
        self.key_shift = _remainder(sub(ZERO, self.start), keys)
        self.I = site.axis("I", _count(a.i.extent, rows, self.shift))
        self.J = site.axis("J", _count(a.j.extent, keys, self.key_shift))
        self._axes = self.I, self.J

    def _offset(self) -> Expr:
        a, at = self.a, self.site.at
        if at is None or not at.causal:
            return known(sub(ZERO, self.start))
        rest = known(sub(at.row, a.i.index))
        return rest if not mentions(rest, a.i.index) else substitute(at.row, {a.i.index: ZERO})

    # ---- where rows, keys and blocks are ----

    def of_row(self, i: Expr) -> Expr:
        return floordiv(add(i, self.shift), Const(self.rows))

    def of_key(self, j: Expr) -> Expr:
        return floordiv(add(j, self.key_shift), Const(self.keys))

    def row_at(self, n: Expr, r: Expr) -> tuple[Expr, Expr]:
        """The r-th row of block n, and whether there is one."""
        return _inside(sub(add(mul(n, Const(self.rows)), r), self.shift), self.a.i.extent, self.rows, self.shift)

    def key_at(self, n: Expr, r: Expr) -> tuple[Expr, Expr]:
        """The r-th key of block n, and whether there is one."""
        at = sub(add(mul(n, Const(self.keys)), r), self.key_shift)
        return _inside(at, self.a.j.extent, self.keys, self.key_shift)

    def position(self, i: Expr) -> Expr:
        """Of row i, counted from the start of the sequence."""
        at = self.site.at
        if at is None or not at.causal:
            return add(i, self.offset)
        return substitute(at.row, {self.a.i.index: i})

    # ---- what the mask of the model leaves ----

    @cached_property
    def last(self) -> Expr | None:
        """The last key that data leaves a sequence."""
        if "start" not in self.site.ends:
            return None
        if "last" in self.site.ends:
            return self.site.ends["last"]
        a, seen = self.a, self.seen(self.a.j.index)
        return reduced(self.site, "last", (), a.j, "max", a.j.index, seen)()

    def seen(self, j: Expr) -> Expr:
        """Whether data leaves key j to its sequence, and it does not come after the last row."""
        a, at = self.a, self.site.at
        parts = _of_keys(a)
        if at is not None and at.causal:
            last = known(add(self.position(sub(a.i.extent, ONE)), self.start))
            if not nonnegative(sub(last, a.j.index), {x.index: x.extent for x in a.axes}):
                parts.append(le(a.j.index, last))
        return substitute(self.simple(and_(*parts)), {a.j.index: j})

    def counts(self, i: Expr) -> Expr:
        """Whether row i is a token of the sequence and not padding."""
        if self.last is None:
            return TRUE
        at = self.position(i)
        return and_(le(ZERO, at), le(at, sub(self.last, self.start)))

    @property
    def row_ends(self) -> tuple[Expr, Expr]:
        """The first row of the call that is a token of the sequence, and the end of those."""
        n = self.a.i.extent
        if self.last is None:
            return ZERO, n
        first = sub(ZERO, self.offset)
        return maximum(first, ZERO), minimum(n, add(add(first, sub(self.last, self.start)), ONE))

    @property
    def key_ends(self) -> tuple[Expr, Expr]:
        """The first key of the sequence, and the end of those."""
        return self.start, self.a.j.extent if self.last is None else add(self.last, ONE)

    @cached_property
    def _held(self) -> Value | None:
        """How many keys of each block there are; None where no data hides any."""
        if self.seen(self.a.j.index) is TRUE:
            return None
        r = self.site.axis("r", Const(self.keys))
        j, there = self.key_at(self.J.index, r.index)
        return reduced(self.site, "held", (self.J,), r, "sum", ONE, and_(there, self.seen(j)))

    @property
    def key_count(self) -> Expr:
        """How many keys of the sequence block J holds."""
        low, high = self._keys_of(self.J.index)
        return self.simple(sub(high, low)) if self._held is None else self._held(self.J.index)

    @property
    def holds(self) -> Expr:
        """Whether block J holds a key of the sequence."""
        low, high = self._keys_of(self.J.index)
        return self.simple(and_(lt(low, high), self._any_held))

    @property
    def _any_held(self) -> Expr:
        return TRUE if self._held is None else gt(self._held(self.J.index), ZERO)

    @cached_property
    def open(self) -> Expr:
        """Whether some row of block I may see some key of block J."""
        low, high = self._keys_of(self.J.index)
        first, end = self._rows_of(self.I.index)
        met = [lt(maximum(lo, low), minimum(hi, high)) for lo, hi in self._of_mask("visit")]
        return self.simple(and_(or_(*met), lt(first, end), self._any_held))

    @cached_property
    def whole(self) -> Expr:
        """Whether all rows of block I see all keys of the sequence in block J."""
        low, high = self._keys_of(self.J.index)
        first, end = self._rows_of(self.I.index)
        inside = [and_(le(lo, low), le(high, hi)) for lo, hi in self._of_mask("full")]
        return self.simple(and_(or_(*inside), lt(first, end), self._any_held))

    def _of_mask(self, which: Literal["visit", "full"]) -> list[tuple[Expr, Expr]]:
        """The keys that the mask of the model, but for what data says of keys, leaves to some or to all rows of block
        I, as intervals."""
        a = self.a
        first, end = self._rows_of(self.I.index)
        tile: dict[Expr, Expr] = {TILE_LO: minimum(first, sub(a.i.extent, ONE)), TILE_HI: end}
        for bound in self._bounds.rows:
            tile[bound.index] = self._over_rows(bound)(self.I.index)
        return [(substitute(x.lo, tile), substitute(x.hi, tile)) for x in getattr(self._bounds, which)]

    @cached_property
    def _bounds(self) -> Bounds:
        plain = tuple(x for x in members("and", self.a.mask) if x not in _of_keys(self.a))
        return loop_bounds(replace(self.a, mask=and_(*plain)), rows=True)

    def _over_rows(self, bound: RowBound) -> Value:
        """The least or largest value of what data says of the rows of each block."""
        if bound.name not in self._made_rows:
            r = self.site.axis("r", Const(self.rows))
            i, there = self.row_at(self.I.index, r.index)
            value = substitute(bound.expr, {self.a.i.index: i})
            least = sub(ZERO, ONE) if bound.op == "max" else self.a.j.extent
            made = reduced(self.site, bound.name, (self.I,), r, bound.op, value, there, least)
            self._made_rows[bound.name] = made
        return self._made_rows[bound.name]

    def _rows_of(self, n: Expr) -> tuple[Expr, Expr]:
        first = sub(mul(n, Const(self.rows)), self.shift)
        return maximum(first, ZERO), minimum(add(first, Const(self.rows)), self.a.i.extent)

    def _keys_of(self, n: Expr) -> tuple[Expr, Expr]:
        first = sub(mul(n, Const(self.keys)), self.key_shift)
        return maximum(first, ZERO), minimum(add(first, Const(self.keys)), self.a.j.extent)

    # ---- blocks that rules always take ----

    @cached_property
    def base(self) -> Expr:
        """The block of keys that the sequence begins with."""
        return self.of_key(self.start)

    def own(self, recent: int = 1) -> Expr:
        """Whether block J holds the key at the position of a row of block I, or is one of the `recent` blocks up to
        those; nothing where rows and keys have no positions in common."""
        if self.site.at is None:
            return FALSE
        least, most = self._own_blocks()
        return self.simple(and_(lt(sub(least, Const(recent)), self.J.index), le(self.J.index, most)))

    def around(self, near: int) -> Expr:
        """Whether block J is at most `near` blocks from one that holds the key at the position of a row of block I;
        nothing where rows and keys have no positions in common."""
        if self.site.at is None:
            return FALSE
        least, most = self._own_blocks()
        j = self.J.index
        return self.simple(and_(le(sub(least, Const(near)), j), le(j, add(most, Const(near)))))

    def _own_blocks(self) -> tuple[Expr, Expr]:
        """The first and the last block that holds the key at the position of a row of block I."""
        first, end = self._rows_of(self.I.index)
        return self._own_block(minimum(first, sub(self.a.i.extent, ONE))), self._own_block(sub(end, ONE))

    def _own_block(self, i: Expr) -> Expr:
        at = add(self.position(maximum(i, ZERO)), self.start)
        if self.last is not None:
            at = minimum(maximum(at, self.start), self.last)
        return self.of_key(at)

    def sinks(self, count: int) -> Expr:
        """Whether block J is one of the first `count` of the sequence."""
        return FALSE if count == 0 else lt(self.J.index, add(self.base, Const(count)))

    # ---- summaries ----

    def mean_of_rows(self, value: OfToken = lambda x, at: x) -> Value:
        """(.., I, d): the mean over the rows of each block of a function of q and of where the row is."""
        return self._summary("rows_mean", "mean", self.a.q, self.a.d, value, rows=True)

    def of_keys(self, name: str, op: Reduction, value: OfToken = lambda x, at: x) -> Value:
        """(.., J, d): the mean, least or largest over the visible keys of each block of a function of k and of where
        the key is."""
        return self._summary(name, op, self.a.k, self.a.d, value, rows=False)

    @cached_property
    def mean_of_keys(self) -> Value:
        """(.., J, d): the mean over the visible keys of each block."""
        return self.of_keys("keys_mean", "mean")

    @cached_property
    def mean_of_values(self) -> Value:
        """(.., J, e): the mean of v over the visible keys of each block."""
        return self._summary("values_mean", "mean", self.a.v, self.a.e, lambda x, at: x, rows=False)

    def _summary(
        self, name: str, op: Reduction, access: Access, component: Axis, value: OfToken, *, rows: bool
    ) -> Value:  # fmt: skip
        a, site = self.a, self.site
        axis = self.I if rows else self.J
        r = site.axis("r", Const(self.rows if rows else self.keys))
        at, there = (self.row_at if rows else self.key_at)(axis.index, r.index)
        seen = and_(there, self.counts(at) if rows else self.seen(at))
        x = substitute(site.load(access.tensor, access.index), {(a.i if rows else a.j).index: at})
        return reduced(site, name, (axis, component), r, op, value(x, at), self.simple(seen))

    def score(self, s: Expr = S) -> Expr:
        """The model's score of a product, as far as it is one of the product alone; else the product over sqrt(d)."""
        a = self.a
        assert isinstance(a.d.extent, Const)
        if not loads(a.score) and not free(a.score) & {x.index for x in a.axes}:
            return substitute(a.score, {S: s})
        return mul(s, const(float(a.d.extent.value) ** -0.5))

    def simple(self, x: Expr) -> Expr:
        """`x` without what the extents prove to be superfluous."""
        axes: Sequence[Axis] = (*self.a.axes, *self._axes)
        return simplify(x, {n.index: n.extent for n in axes})


def group_of(a: Attention) -> int:
    """How many heads of queries, the last axis of the batch, read the same head of keys."""
    if not a.batch or not isinstance(a.batch[-1].extent, Const):
        return 1
    heads, head = int(a.batch[-1].extent.value), a.batch[-1].index
    x = Load(a.k.tensor, a.k.index, "float")
    if not mentions(x, head):
        return heads
    found = blocks_of(x, head)
    return 1 if found is None or heads % found[1] else found[1]


def all_heads(a: Attention) -> dict[Axis, int]:
    """All heads of queries as one group: the axes that they are counted through by, with their extents."""
    return {x: int(x.extent.value) for x in heads_of(a) if isinstance(x.extent, Const)}


def no_heads(a: Attention) -> Reason | None:
    """Why nothing can be chosen for all heads alike, or None."""
    return None if all_heads(a) else because("policy-no-heads")


def _of_keys(a: Attention) -> list[Expr]:
    """The parts of the mask that say of a key alone, from data, whether it is there."""
    return [x for x in members("and", a.mask) if loads(x) and mentions(x, a.j.index) and not mentions(x, a.i.index)]


def _remainder(x: Expr, size: int) -> Expr:
    return mod(known(x), Const(size))


def _count(extent: Expr, size: int, shift: Expr) -> Expr:
    """How many blocks of `size` meet `extent` elements of which the first stands anywhere in its block."""
    more = 0 if shift is ZERO else size - 1
    return floordiv(add(extent, Const(size - 1 + more)), Const(size))


def _inside(at: Expr, extent: Expr, size: int, shift: Expr) -> tuple[Expr, Expr]:
    """An index as one that is in range, and whether it was."""
    if shift is ZERO and isinstance(extent, Const) and int(extent.value) % size == 0:
        return at, TRUE
    low = ZERO if shift is ZERO else maximum(at, ZERO)
    clamped = minimum(at if low is ZERO else low, sub(extent, ONE))
    return clamped, and_(TRUE if shift is ZERO else le(ZERO, at), lt(at, extent))

