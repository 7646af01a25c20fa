"""Expressions of the distance between a row and a key: what a tile needs of them is one number a diagonal.

LANES rows and n keys meet n + LANES - 1 distances, so a table of them is made once a block and each key reads its lanes
from it in one load, whatever the expression costs: bucketed tables, slopes, decays, windows of weights.
"""

from __future__ import annotations

from attncc.ir import Attention, Expr, Op, Var
from attncc.ir.affine import Poly, plus, poly
from attncc.ir.expr import free, loads, walk

_LEAST = 2  # operations that a read of the table is worth


class Diagonals:
    """Which expressions of one attention depend on row and key by their distance alone, and are worth a table."""

    def __init__(self, a: Attention) -> None:
        self.i, self.j = a.i.index, a.j.index
        self.tables: dict[Expr, int] = {}
        self._by_distance: dict[Expr, bool] = {}

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

    def by_distance(self, x: Expr) -> bool:
        """Whether `x` is the same at (i + 1, j + 1)."""
        if x not in self._by_distance:
            self._by_distance[x] = self._stays(x)
        return self._by_distance[x]

    def _stays(self, x: Expr) -> bool:
        if x in (self.i, self.j) or isinstance(x, Var):
            return False
        if isinstance(x, Op) and x.args[0].kind == "int" and x.name in ("add", "sub", "mul", "neg"):
            return self._linear(poly(x))
        if isinstance(x, Op) and x.args[0].kind == "int" and x.name in ("lt", "le", "eq", "ne"):
            return self._linear(plus(poly(x.args[0]), poly(x.args[1]), -1))
        return all(self.by_distance(n) for n in x.children)

    def _linear(self, p: Poly) -> bool:
        """Whether row and key come as a multiple of their difference."""
        times = 0
        for factors, count in p.items():
            if not {self.i, self.j} & set(factors):
                if not all(self.by_distance(f) for f in factors):
                    return False
            elif len(factors) > 1:
                return False
            else:
                times += count
        return times == 0
