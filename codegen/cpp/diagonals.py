"""Expressions of the distance between a row and a key: what a tile needs of them is one number a diagonal.

LANES rows and n keys meet n + LANES - 1 distances, so a table of them is made once a block and each key reads its lanes
from it in one load, whatever the expression costs: bucketed tables, slopes, decays, windows of weights.
"""

from __future__ import annotations

from attncc.ir import Attention, Expr, Op
from attncc.ir.distance import ByDistance
from attncc.ir.expr import free, loads, walk

_LEAST = 2  # operations that a read of the table is worth


class Diagonals:
    """Which expressions of one attention depend on row and key by their distance alone, and are worth a table."""

    def __init__(self, a: Attention) -> None:
        self.i, self.j = a.i.index, a.j.index
        self.tables: dict[Expr, int] = {}
        self.by_distance = ByDistance(self.i, self.j)

    def place(self, x: Expr) -> int | None:
        """The number of the table of `x`, or None."""
        if not self.tabled(x):
            return None
        if not loads(x) and sum(isinstance(n, Op) for n in walk(x)) <= _LEAST:
            return None
        return self.tables.setdefault(x, len(self.tables))

    def tabled(self, x: Expr) -> bool:
        """Whether `x` may be a table."""
        return x.kind == "float" and {self.i, self.j} <= free(x) and self.by_distance(x)
