"""Predicates get one spelling, and what the extents of the axes decide goes away.

    where(p, x, y)          ->  (p and x) or (not p and y)                 for booleans
    0 <= i - j, j < i + 1   ->  j <= i                                     integer comparisons, terms gathered
    j < M, 0 <= j           ->  true                                       proven by the extents
    x and y and x           ->  x and y                                    also where y is implied by x
    x and (x or y)          ->  x

In a comparison all terms stand on the side where they are positive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attncc.ir import Attention, Expr, Op, Program
from attncc.ir.affine import Extents, expr, nonnegative, poly
from attncc.ir.analysis import members
from attncc.ir.build import FALSE, ONE, TRUE, and_, not_, op, or_, sub
from attncc.ir.rewrite import rewrite
from attncc.passes.bounds.predicates import settled
from attncc.passes.protocol import Legality, on_attentions
from attncc.passes.rewrites.expressions import map_expressions


@dataclass(frozen=True)
class FoldPredicates:
    """0 <= i - j  ->  j <= i,    x and y and x  ->  x and y,    j < M  ->  true"""

    name: ClassVar[str] = "fold-predicates"
    legality: ClassVar[Legality] = "exact"

    def __call__(self, p: Program, /) -> Program:
        return on_attentions(p, fold_predicates)


def fold_predicates(a: Attention) -> Attention:
    """`a` with the booleans of its mask, score, sink and weight folded. Visible keys and values stay what they were."""
    extents: dict[Expr, Expr] = {x.index: x.extent for x in a.axes}
    folder = Folder(extents)
    return map_expressions(a, folder.fold)


@dataclass(frozen=True)
class Folder:
    extents: Extents

    def fold(self, root: Expr) -> Expr:
        return rewrite(root, self._rule)

    def _rule(self, x: Expr) -> Expr | None:
        if not isinstance(x, Op) or x.kind != "bool":
            return None
        match x:
            case Op("lt" | "le" | "eq" | "ne", (a, _)) if a.kind == "int":
                return self._comparison(x)
            case Op("where", (c, a, b)):
                return self._chain("or", [self._chain("and", [c, a]), self._chain("and", [self._not(c), b])])
            case Op(("and" | "or") as name, (a, b)):
                return self._chain(name, [a, b])
            case Op("not", (a,)):
                return self._not(a)
            case _:
                return None

    def _not(self, x: Expr) -> Expr:
        """The negation, pushed inward so that comparisons keep their one spelling."""
        match x:
            case Op("and" | "or", (a, b)):
                return self._chain("or" if x.name == "and" else "and", [self._not(a), self._not(b)])
            case Op("lt" | "le" | "eq" | "ne", (a, _)) if a.kind == "int":
                return self._comparison(not_(x))
            case _:
                return not_(x)

    def _comparison(self, x: Expr) -> Expr:
        decided = settled(x, self.extents)
        if decided is not None:
            return TRUE if decided else FALSE
        assert isinstance(x, Op)
        slack = sub(x.args[1], x.args[0])
        terms = poly(sub(slack, ONE) if x.name == "lt" else slack)
        left = expr({m: -c for m, c in terms.items() if c < 0})
        right = expr({m: c for m, c in terms.items() if c > 0})
        if x.name in ("eq", "ne"):
            left, right = sorted((left, right), key=repr, reverse=True)
        return op("le" if x.name == "lt" else x.name, left, right)

    def _chain(self, name: str, parts: list[Expr]) -> Expr:
        other = "or" if name == "and" else "and"
        held = list(dict.fromkeys(m for p in parts for m in members(name, p)))
        if any(self._not(m) in held for m in held):
            return FALSE if name == "and" else TRUE
        kept: list[Expr] = []
        for at, x in enumerate(held):
            rest = [*kept, *held[at + 1 :]]
            # in a conjunction what another member implies says nothing new, in a disjunction what implies another one
            redundant = any(self._implies(y, x) if name == "and" else self._implies(x, y) for y in rest)
            absorbed = any(y in members(other, x) for y in rest)
            if not (redundant or absorbed):
                kept.append(x)
        return and_(*kept) if name == "and" else or_(*kept)

    def _implies(self, x: Expr, y: Expr) -> bool:
        if not (isinstance(x, Op) and isinstance(y, Op)) or x.name != "le" or y.name != "le":
            return False
        if x.args[0].kind != "int" or y.args[0].kind != "int":
            return False
        return nonnegative(sub(sub(y.args[1], y.args[0]), sub(x.args[1], x.args[0])), self.extents)
