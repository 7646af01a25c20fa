"""Expressions that depend on row and key by their distance alone."""

from __future__ import annotations

from attncc.ir.affine import Poly, plus, poly
from attncc.ir.terms import Expr, Op, Var


class ByDistance:
    """Whether expressions are the same at (i + 1, j + 1), of which it remembers what it found."""

    def __init__(self, i: Expr, j: Expr) -> None:
        self.i, self.j = i, j
        self._known: dict[Expr, bool] = {}

    def __call__(self, x: Expr) -> bool:
        if x not in self._known:
            self._known[x] = self._stays(x)
        return self._known[x]

    def _stays(self, x: Expr) -> bool:
        if x in (self.i, self.j) or isinstance(x, Var):
            return False
        if isinstance(x, Op) and x.args[0].kind == "int" and x.name in ("add", "sub", "mul", "neg"):
            return self._linear(poly(x))
        if isinstance(x, Op) and x.args[0].kind == "int" and x.name in ("lt", "le", "eq", "ne"):
            return self._linear(plus(poly(x.args[0]), poly(x.args[1]), -1))
        return all(self(n) for n in x.children)

    def _linear(self, p: Poly) -> bool:
        """Whether row and key come as a multiple of their difference."""
        times = 0
        for factors, count in p.items():
            if not {self.i, self.j} & set(factors):
                if not all(self(f) for f in factors):
                    return False
            elif len(factors) > 1:
                return False
            else:
                times += count
        return times == 0
