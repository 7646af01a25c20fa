"""Blocks of keys by what their antidiagonals score, every `stride`-th of them.

Xu et al., 2025 (XAttention, arXiv 2503.16428), as its released code has it: `mit-han-lab/x-attention`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attncc.ir import Attention, Const, Expr, Program, S
from attncc.ir.build import (
    ONE,
    ZERO,
    add,
    and_,
    cast,
    const,
    floordiv,
    le,
    lt,
    maximum,
    minimum,
    mod,
    mul,
    op,
    or_,
    sub,
    where,
)  # fmt: skip
from attncc.ir.expr import substitute
from attncc.ir.reasons import Reason
from attncc.passes.policies.block_means import check, shared, taken
from attncc.passes.policies.blocks import Blocks, no_blocks
from attncc.passes.policies.hiding import Form, Hiding, hide
from attncc.passes.policies.making import Value, reduced, scored
from attncc.passes.protocol import Legality


@dataclass(frozen=True)
class Antidiagonal:
    """s(F, G)    = mean over t of q[F stride + stride - 1 - t] . k[G stride + t]         runs F of rows and G of keys
    p(I, J)    = sum over the runs F of I and G of J of softmax_G( score( s(F, G) ) )
    keep(i, j) = J is among the blocks of row block I that `take` takes by p, the own and the first `sinks` blocks first

    `block`: tokens; `stride`: tokens of a run, dividing a block; `take`, `amount`, `sinks`, `recent`, `share`: as in
    block-means."""

    name: ClassVar[str] = "antidiagonal"
    legality: ClassVar[Legality] = "approximate"
    block: int = 128
    stride: int = 16
    take: str = "mass"
    amount: float = 0.9
    sinks: int = 1
    recent: int = 1
    share: str = "none"

    def __post_init__(self) -> None:
        check(self.block, self.block, self.take, self.amount, self.share)
        if self.stride < 1 or self.block % self.stride:
            raise ValueError(f"runs of {self.stride} do not divide blocks of {self.block}")

    def __call__(self, p: Program, /) -> Program:
        return hide(p, Form(self))

    def applies(self, a: Attention) -> Reason | None:
        return no_blocks(a)

    def keep(self, site: Hiding) -> Expr:
        b, runs = Blocks(site, self.block, self.block), Blocks(site, self.stride, self.stride)
        p = shared(b, _in_blocks(b, runs, _of_runs(runs)), self.share)
        return taken(b, p, self.take, self.amount, or_(b.sinks(self.sinks), b.own(self.recent)))


def _of_runs(b: Blocks) -> Value:
    """(.., F, G): the weights of runs of keys for runs of rows."""
    a, site, stride = b.a, b.site, b.rows
    assert isinstance(a.d.extent, Const)
    width = int(a.d.extent.value)
    c = site.axis("c", Const(stride * width))
    t, d = floordiv(c.index, Const(width)), mod(c.index, Const(width))
    i, row = b.row_at(b.I.index, sub(Const(stride - 1), t))
    j, key = b.key_at(b.J.index, t)
    q, k = (site.load(x.tensor, x.index) for x in (a.q, a.k))
    x, y = substitute(q, {a.i.index: i, a.d.index: d}), substitute(k, {a.j.index: j, a.d.index: d})
    x, y = where(and_(row, b.counts(i)), x, const(0.0)), where(and_(key, b.seen(j)), y, const(0.0))
    mean = op("div", S, cast(maximum(_pairs(b), ONE), "float"))
    return scored(site, "runs", b.I, b.J, c, x, y, b.simple(b.score(mean)), b.open)


def _pairs(b: Blocks) -> Expr:
    """How many pairs of a row and a key a run of rows and one of keys have on their antidiagonal: fewer than the stride
    at the ends of the sequence and of the call."""
    stride = Const(b.rows)
    row, row_end = _part(sub(mul(b.I.index, stride), b.shift), *b.row_ends, stride)
    key, key_end = _part(sub(mul(b.J.index, stride), b.key_shift), *b.key_ends, stride)
    return sub(minimum(key_end, sub(stride, row)), maximum(key, sub(stride, row_end)))


def _part(at: Expr, first: Expr, end: Expr, stride: Expr) -> tuple[Expr, Expr]:
    """Where in the run that begins at `at` the elements from `first` to `end` begin and end."""
    inside = (minimum(maximum(sub(x, at), ZERO), stride) for x in (first, end))
    return next(inside), next(inside)


def _in_blocks(b: Blocks, runs: Blocks, w: Value) -> Value:
    """(.., I, J): the weights of runs, summed in blocks."""
    site, many = b.site, b.rows // runs.rows
    r = site.axis("r", Const(many))
    at, there = _run(b.J.index, r.index, b.key_shift, runs.J.extent, runs.rows, many)
    by_key = reduced(site, "runs_sum", (runs.I, b.J), r, "sum", w(runs.I.index, at), b.simple(there))
    at, there = _run(b.I.index, r.index, b.shift, runs.I.extent, runs.rows, many)
    return reduced(site, "p", (b.I, b.J), r, "sum", by_key(at, b.J.index), b.simple(there))


def _run(block: Expr, r: Expr, shift: Expr, count: Expr, stride: int, many: int) -> tuple[Expr, Expr]:
    """The r-th run of a block, and whether there is one."""
    at = sub(add(mul(block, Const(many)), r), floordiv(shift, Const(stride)))
    return minimum(maximum(at, ZERO), sub(count, ONE)), and_(le(ZERO, at), lt(at, count))
