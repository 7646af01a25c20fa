"""Columns and diagonals of blocks that hold a mass, or blocks by their means where those tell as much.

Lai et al., 2025 (FlexPrefill, arXiv 2502.20766), as its released code has it: `ByteDance-Seed/FlexPrefill`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from attncc.ir import Attention, Axis, Const, Expr, Load, Program, S
from attncc.ir.build import (
    ONE,
    TRUE,
    ZERO,
    add,
    and_,
    const,
    eq,
    floordiv,
    le,
    lt,
    maximum,
    minimum,
    mul,
    op,
    or_,
    sub,
    where,
)  # fmt: skip
from attncc.ir.reasons import Reason
from attncc.passes.policies.block_means import by_means
from attncc.passes.policies.blocks import Blocks
from attncc.passes.policies.hiding import Form, Hiding, hide
from attncc.passes.policies.making import Value, reduced, scored, selected
from attncc.passes.policies.sample import Sample, block_of_diagonal, no_diagonals
from attncc.passes.protocol import Legality


@dataclass(frozen=True)
class FlexPrefill:
    """keep(i, j) = J is one of the nv columns, or I - J one of the ns diagonals, of blocks with the largest sums over
                 the last `block` rows; or the head is aware and (I, J) among the pairs that hold the mass `gamma` of
                 all softmax_J( score( mean of q over I . mean of k over J ) )
    nv, ns     = ( the tokens of columns, of diagonals, that hold the mass `gamma` ) // block + 1, at least `least`
    aware      = sqrt(JS( column sums, softmax_J( score( mean of those rows . mean of k over J ) ) )) < `tau`;
                 then nv = ns = `least`

    `block`: tokens; `least`: tokens, counted in whole blocks. The first column and the own diagonal come first. Calls
    of at most two blocks or `least` rows see all keys."""

    name: ClassVar[str] = "flex-prefill"
    legality: ClassVar[Legality] = "approximate"
    block: int = 128
    gamma: float = 0.9
    tau: float = 0.1
    least: int = 512

    def __post_init__(self) -> None:
        if self.block < 1 or self.least < 1 or not 0 < self.gamma <= 1 or self.tau < 0:
            raise ValueError("block and least are at least 1, gamma is above 0 and at most 1, tau at least 0")

    def __call__(self, p: Program, /) -> Program:
        return hide(p, Form(self))

    def applies(self, a: Attention) -> Reason | None:
        return no_diagonals(a)

    def keep(self, site: Hiding) -> Expr:
        b = Blocks(site, self.block, self.block)
        least = -(-self.least // self.block)
        few = le(b.a.i.extent, Const(max(2, least) * self.block))
        if few is TRUE:
            return TRUE
        sample = Sample(b, self.block)
        column_sums = _block_sums(b, "column_sums", sample.columns, b.J, b.key_at)
        n = site.axis("n", floordiv(add(b.a.j.extent, Const(self.block - 1)), Const(self.block)))
        diagonal_sums = _block_sums(b, "diagonal_sums", sample.diagonals, n, _from_zero(b))
        far = _distance(b, sample, column_sums)
        aware = lt(far(), const(self.tau * self.tau))
        j, o = b.a.j, sample.offsets
        columns, diagonals = (
            where(aware, Const(least), maximum(self._blocks(site, name, axis, value(axis.index), seen), Const(least)))
            for name, axis, value, seen in (
                ("columns", j, sample.columns, sample.open_columns),
                ("diagonals", o, sample.diagonals, sample.open_diagonals),
            )
        )  # fmt: skip
        column = selected(
            site, "column", (b.J,), column_sums(b.J.index), "count", columns, seen=b.holds, first=eq(b.J.index, b.base)
        )
        diagonal = selected(
            site, "diagonal", (n,), diagonal_sums(n.index), "count", diagonals,
            seen=le(mul(n.index, Const(self.block)), sample.last), first=eq(n.index, ZERO),
        )  # fmt: skip
        p = by_means(b)(b.I.index, b.J.index)
        pair = selected(site, "pair", (b.I, b.J), p, "mass", const(self.gamma), seen=b.open)
        row, key = b.of_row(b.a.i.index), b.of_key(j.index)
        apart = minimum(maximum(block_of_diagonal(b), ZERO), floordiv(sub(o.extent, ONE), Const(self.block)))
        return or_(few, column(key), diagonal(apart), and_(aware, pair(row, key)))

    def _blocks(self, site: Hiding, name: str, axis: Axis, value: Expr, seen: Expr) -> Expr:
        """How many blocks the tokens that hold the mass fill."""
        held = selected(site, f"{name}_held", (axis,), value, "mass", const(self.gamma), seen=seen)
        count = reduced(site, f"{name}_count", (), axis, "sum", where(held(axis.index), ONE, ZERO))
        return add(floordiv(count(), Const(self.block)), ONE)


#: The r-th element of block n, and whether there is one.
At = Callable[[Expr, Expr], tuple[Expr, Expr]]


def _block_sums(b: Blocks, name: str, made: Value, blocks: Axis, at: At) -> Value:
    r = b.site.axis("r", Const(b.keys))
    index, there = at(blocks.index, r.index)
    return reduced(b.site, name, (blocks,), r, "sum", made(index), b.simple(there))


def _from_zero(b: Blocks) -> At:
    def at(n: Expr, r: Expr) -> tuple[Expr, Expr]:
        o = add(mul(n, Const(b.keys)), r)
        return minimum(o, sub(b.a.j.extent, ONE)), lt(o, b.a.j.extent)

    return at


def _distance(b: Blocks, sample: Sample, column_sums: Value) -> Value:
    """The Jensen-Shannon divergence between the column sums of blocks, as shares, and the weights of the sample's mean
    row for the means of the blocks."""
    site, a = b.site, b.a
    q = sample.of_rows(Load(a.q.tensor, a.q.index, "float"))
    mean = reduced(site, "sample_mean", (a.d,), sample.rows, "mean", q, sample.there)
    keys = b.of_keys("keys_mean", "mean")
    one = site.axis("one", ONE)
    p = scored(site, "pooled", one, b.J, a.d, mean(a.d.index), keys(b.J.index, a.d.index), b.score(S), b.holds)
    whole = reduced(site, "whole", (), b.J, "sum", column_sums(b.J.index))
    x = p(ZERO, b.J.index)
    y = op("div", column_sums(b.J.index), maximum(whole(), const(1e-30)))
    middle = mul(add(x, y), const(0.5))
    terms = [
        where(lt(const(0.0), z), mul(z, op("log", op("div", z, maximum(middle, const(1e-30))))), const(0.0))
        for z in (x, y)
    ]
    return reduced(site, "distance", (), b.J, "sum", mul(add(*terms), const(0.5)))
