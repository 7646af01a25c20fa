"""Columns of keys and diagonals of blocks, chosen by the weights of the last rows.

Jiang et al., 2024 (MInference, arXiv 2407.02490), as its released code has it: `microsoft/MInference`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attncc.ir import Attention, Axis, Const, Expr, Program
from attncc.ir.build import ONE, ZERO, add, and_, eq, floordiv, le, lt, maximum, minimum, mul, or_, sub, where
from attncc.ir.reasons import Reason
from attncc.passes.policies.blocks import Blocks
from attncc.passes.policies.hiding import Form, Hiding, hide
from attncc.passes.policies.making import Value, reduced, selected
from attncc.passes.policies.sample import Sample, block_of_diagonal, no_diagonals
from attncc.passes.protocol import Legality

#: Columns are looked for in cells of so many keys before they are looked at one by one.
_CELL = 16


@dataclass(frozen=True)
class VerticalSlash:
    """keep(i, j) = j is one of `columns` keys that the last `rows` rows give most, or the blocks of row(i) and j stand
    as far from each other as those of a row and the key of one of the `diagonals` diagonals that they give most

    The first `sinks` keys and the last `recent` diagonals come first; all counts are of tokens, `block` too. Diagonals
    are kept as blocks, as the released kernel does; columns one by one."""

    name: ClassVar[str] = "vertical-slash"
    legality: ClassVar[Legality] = "approximate"
    columns: int = 1000
    diagonals: int = 4096
    rows: int = 64
    block: int = 64
    sinks: int = 30
    recent: int = 100

    def __post_init__(self) -> None:
        if min(self.columns, self.diagonals, self.rows, self.block, self.recent) < 1 or self.sinks < 0:
            raise ValueError("columns, diagonals, rows, block and recent are at least 1, sinks at least 0")

    def __call__(self, p: Program, /) -> Program:
        return hide(p, Form(self))

    def applies(self, a: Attention) -> Reason | None:
        return no_diagonals(a)

    def keep(self, site: Hiding) -> Expr:
        b = Blocks(site, self.block, self.block)
        sample = Sample(b, self.rows)
        j, o = b.a.j, sample.offsets
        column = selected(
            site, "column", (j,), sample.columns(j.index), "count", Const(self.columns), seen=sample.open_columns,
            first=lt(j.index, add(b.start, Const(self.sinks))),
        )  # fmt: skip
        diagonal = selected(
            site, "diagonal", (o,), sample.diagonals(o.index), "count", Const(self.diagonals),
            seen=sample.open_diagonals, first=lt(o.index, Const(self.recent)),
        )  # fmt: skip
        cell = any_of(site, "cell", column, _CELL, j.extent)
        columns = and_(eq(cell(floordiv(j.index, Const(_CELL))), ONE), column(j.index))
        return or_(columns, _touched(b, diagonal, o))


def any_of(site: Hiding, name: str, made: Value, size: int, count: Expr) -> Value:
    """Whether any of each `size` of `count` values is set, as 1 or 0."""
    r = site.axis("r", Const(size))
    n = site.axis("n", floordiv(add(count, Const(size - 1)), Const(size)))
    at = add(mul(n.index, Const(size)), r.index)
    value = where(made(minimum(at, sub(count, ONE))), ONE, ZERO)
    return reduced(site, name, (n,), r, "max", value, lt(at, count), ZERO)


def _touched(b: Blocks, diagonal: Value, o: Axis) -> Expr:
    """Whether a chosen diagonal runs through the block of row i and key j."""
    size = b.rows
    n = b.site.axis("n", floordiv(add(o.extent, Const(2 * size - 2)), Const(size)))
    r = b.site.axis("r", Const(2 * size - 1))
    at = add(sub(mul(n.index, Const(size)), Const(size - 1)), r.index)
    value = where(diagonal(minimum(maximum(at, ZERO), sub(o.extent, ONE))), ONE, ZERO)
    there = and_(le(ZERO, at), lt(at, o.extent))
    blocks = reduced(b.site, "diagonal_blocks", (n,), r, "max", value, there, ZERO)
    far = minimum(maximum(block_of_diagonal(b), ZERO), floordiv(sub(o.extent, ONE), Const(size)))
    return eq(blocks(far), ONE)
