"""Predicates in disjunctive normal form over integer inequalities.

A clause is a conjunction of atoms. An integer comparison becomes atoms `0 <= x` with x a canonical polynomial; `min`,
`max`, `abs`, `where` and 0/1 casts of booleans inside it are lifted into the boolean structure,

    max(a, b) <= c  ->  a <= c and b <= c            |a| <= c  ->  a <= c and -a <= c
    where(p, a, b) <= c  ->  (p and a <= c) or (not p and b <= c)

so that what remains is solvable one index at a time. Anything else (a boolean load, a comparison of floats, a
comparison that reads data at a key) stays one opaque atom. What the extents prove is removed, here and between atoms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from attncc.ir.affine import Extents, expr, less_than, nonnegative, poly
from attncc.ir.build import ONE, ZERO, add, and_, const, le, maximum, minimum, mul, not_, or_, sub
from attncc.ir.expr import Const, Expr, Index, Load, Op, mentions, rewrite, walk

Clause = frozenset[Expr]
MAX_CLAUSES = 96


class TooManyClauses(Exception):
    """The normal form would be larger than any mask met in practice; callers fall back to no bounds."""


def reads(x: Expr, *indices: Expr) -> bool:
    """Whether `x` loads data at one of `indices`."""
    return any(isinstance(n, Load) and mentions(n, *indices) for n in walk(x))


class NormalForm:
    """Disjunctive normal form of predicates over the row index `i` and the key index `j`."""

    def __init__(self, i: Expr, j: Expr, extents: Extents) -> None:
        self.i, self.j, self.extents = i, j, extents
        self._proofs: dict[Expr, bool] = {}

    def clauses(self, p: Expr, *, positive: bool = True) -> list[Clause]:
        """Clauses whose disjunction is `p` (or `not p`). `[]` is false, `[frozenset()]` true.

        Raises TooManyClauses."""
        return self._absorb(self._expand(p, positive))

    def _expand(self, p: Expr, positive: bool) -> list[Clause]:
        match p:
            case Const(value):
                return [frozenset()] if bool(value) == positive else []
            case Op("not", (a,)):
                return self._expand(a, not positive)
            case Op("and", (a, b)) if positive:
                return self._both(a, b, True)
            case Op("or", (a, b)) if not positive:
                return self._both(a, b, False)
            case Op("and" | "or", (a, b)):
                return self._limit([*self._expand(a, positive), *self._expand(b, positive)])
            case Op("where", (c, a, b)):
                yes, no = (a, b) if positive else (not_(a), not_(b))
                return self._expand(or_(and_(c, yes), and_(not_(c), no)), True)
            case Op(("lt" | "le" | "eq" | "ne") as name, (a, b)) if a.kind == "int" and not reads(p, self.j):
                return self._comparison(name, a, b, positive)
            case Op("ne" | "eq", (Op("int", (a,)), Op("int", (b,)))) if a.kind == b.kind == "bool":
                same = or_(and_(a, b), and_(not_(a), not_(b)))
                return self._expand(same, positive == (p.name == "eq"))
            case _:
                return [frozenset([p if positive else not_(p)])]

    def _both(self, a: Expr, b: Expr, positive: bool) -> list[Clause]:
        return self._product(self._expand(a, positive), self._expand(b, positive))

    def _comparison(self, name: str, a: Expr, b: Expr, positive: bool) -> list[Clause]:
        less = sub(sub(b, a), ONE)  # a < b
        more = sub(sub(a, b), ONE)  # a > b
        if name in ("eq", "ne"):
            if (name == "eq") == positive:
                return self._product(self._at_least_zero(sub(b, a)), self._at_least_zero(sub(a, b)))
            return self._limit([*self._at_least_zero(less), *self._at_least_zero(more)])
        if name == "lt":
            return self._at_least_zero(less if positive else sub(a, b))
        return self._at_least_zero(sub(b, a) if positive else more)

    def _at_least_zero(self, x: Expr) -> list[Clause]:
        p = poly(x)
        by_key = mentions(x, self.j)
        for m, c in p.items():
            for factor in m:
                if isinstance(factor, Op) and len(m) == 1 and self._branches(factor, by_key):
                    rest = expr({n: d for n, d in p.items() if n != m})
                    lifted = self._lift(factor, c, rest)
                    if lifted is not None:
                        return self._limit(lifted)
        canonical = expr(p)
        if self._proven(canonical):
            return [frozenset()]
        if self._proven(expr(poly(sub(sub(ZERO, canonical), ONE)))):
            return []
        return [frozenset([le(ZERO, canonical)])]

    def _branches(self, x: Op, by_key: bool) -> bool:
        """Whether `x` is to be lifted: a choice always; an extreme only where it hides the index to solve for."""
        if x.name in ("where", "int"):
            return mentions(x, self.i, self.j)
        return mentions(x, self.j) if by_key else mentions(x, self.i)

    def _lift(self, factor: Op, c: int, rest: Expr) -> list[Clause] | None:
        def at(value: Expr) -> list[Clause]:
            return self._at_least_zero(add(mul(value, const(c)), rest))

        match factor:
            case Op(("min" | "max") as name, (a, b)):
                both = (name == "min") == (c > 0)
                return self._product(at(a), at(b)) if both else [*at(a), *at(b)]
            case Op("abs", (a,)):
                both = c < 0
                negative = sub(ZERO, a)
                return self._product(at(a), at(negative)) if both else [*at(a), *at(negative)]
            case Op("where", (p, a, b)):
                yes = self._product(self._expand(p, True), at(a))
                return [*yes, *self._product(self._expand(p, False), at(b))]
            case Op("int", (p,)) if p.kind == "bool":
                yes = self._product(self._expand(p, True), at(ONE))
                return [*yes, *self._product(self._expand(p, False), at(ZERO))]
            case _:
                return None

    def _product(self, xs: list[Clause], ys: list[Clause]) -> list[Clause]:
        products = (self._reduce(x | y) for x in xs for y in ys)
        return self._limit([c for c in products if c is not None])

    def _limit(self, clauses: list[Clause]) -> list[Clause]:
        distinct = list(dict.fromkeys(clauses))
        if len(distinct) > MAX_CLAUSES:
            distinct = self._absorb(distinct)
        if len(distinct) > MAX_CLAUSES:
            raise TooManyClauses
        return distinct

    def _reduce(self, clause: Clause) -> Clause | None:
        """`clause` without the atoms that others imply, or None if two of its atoms exclude each other."""
        atoms = sorted(clause, key=repr)
        kept: list[Expr] = []
        for at, x in enumerate(atoms):
            if not_(x) in clause or any(self.exclude(x, y) for y in atoms[at + 1 :]):
                return None
            others = [*kept, *atoms[at + 1 :]]
            if not any(self.implies(y, x) for y in others):
                kept.append(x)
        return frozenset(kept)

    def implies(self, x: Expr, y: Expr) -> bool:
        """Whether atom `x` is proven to imply atom `y`."""
        if x is y:
            return True
        a, b = inequality(x), inequality(y)
        return a is not None and b is not None and self._proven(expr(poly(sub(b, a))))

    def exclude(self, x: Expr, y: Expr) -> bool:
        """Whether atoms `x` and `y` are proven never to hold together."""
        a, b = inequality(x), inequality(y)
        return a is not None and b is not None and self._proven(expr(poly(sub(sub(ZERO, ONE), add(a, b)))))

    def _proven(self, x: Expr) -> bool:
        if x not in self._proofs:
            self._proofs[x] = nonnegative(x, self.extents)
        return self._proofs[x]

    def _absorb(self, clauses: Iterable[Clause]) -> list[Clause]:
        """Without the clauses that another one covers."""
        kept: list[Clause] = []
        for clause in sorted(set(clauses), key=lambda c: (len(c), sorted(map(repr, c)))):
            if not any(self._covers(other, clause) for other in kept):
                kept.append(clause)
        return kept

    def _covers(self, wide: Clause, narrow: Clause) -> bool:
        return all(any(self.implies(x, y) for x in narrow) for y in wide)


def map_literals(p: Expr, f: Callable[[Expr], Expr], *, positive: bool = True) -> Expr:
    """`p` (or `not p`) with negations pushed down to its literals and `f` applied to each of them."""
    match p:
        case Op("not", (a,)):
            return map_literals(a, f, positive=not positive)
        case Op("and" | "or", (a, b)):
            join = and_ if (p.name == "and") == positive else or_
            return join(map_literals(a, f, positive=positive), map_literals(b, f, positive=positive))
        case Op("where", (c, a, b)):
            yes = and_(map_literals(c, f), map_literals(a, f, positive=positive))
            return or_(yes, and_(map_literals(c, f, positive=False), map_literals(b, f, positive=positive)))
        case _:
            return f(p if positive else not_(p))


def with_clamps(root: Expr, extents: Extents) -> Expr:
    """`root` with choices and sums that are extremes spelled as such, so that their ends over a tile are exact:

    where(0 <= p, b + t, b)   ->  b + min(t, 0) for t = -p or -p - 1, b + max(t, 0) for t = p or p + 1
    max(x, 0) + min(k - x, 0) ->  min(max(x, 0), k) for k >= 0, which keeps a window of keys inside the sequence
    """

    def rule(x: Expr) -> Expr | None:
        if not isinstance(x, Op) or x.kind != "int":
            return None
        if x.name in ("add", "sub"):
            return _clamped_sum(x, extents)
        if x.name != "where":
            return None
        condition, a, b = x.args
        if not (isinstance(condition, Op) and condition.name in ("lt", "le") and condition.args[0].kind == "int"):
            return None
        p = sub(condition.args[1], condition.args[0])
        p = sub(p, ONE) if condition.name == "lt" else p
        for sign, join in ((1, maximum), (-1, minimum)):
            off = poly(sub(mul(sub(a, b), const(sign)), p))
            if off in ({}, {(): 1}):
                return add(b, join(expr(poly(sub(a, b))), ZERO))
        return None

    return rewrite(root, rule)


def _clamped_sum(x: Expr, extents: Extents) -> Expr | None:
    terms = poly(x)
    tops = [(m[0], c) for m, c in terms.items() if len(m) == 1 and isinstance(m[0], Op) and m[0].name == "max"]
    bottoms = [(m[0], c) for m, c in terms.items() if len(m) == 1 and isinstance(m[0], Op) and m[0].name == "min"]
    for top, c in tops:
        for bottom, d in bottoms:
            low, high = _varying(top), _varying(bottom)
            if c != d or low is None or high is None:
                continue
            room = expr(poly(add(sub(low[0], low[1]), sub(high[0], high[1]))))
            if any(isinstance(n, Index) for n in walk(room)) or not nonnegative(room, extents):
                continue
            rest = expr({m: k for m, k in terms.items() if m not in ((top,), (bottom,))})
            clamp = minimum(maximum(expr(poly(sub(*low))), ZERO), room)
            return add(rest, mul(add(clamp, add(low[1], high[1])), const(c)))
    return None


def _varying(x: Expr) -> tuple[Expr, Expr] | None:
    """(the argument of a minimum or maximum that depends on an index, the one that does not)."""
    if not isinstance(x, Op):
        return None
    a, b = (any(isinstance(n, Index) for n in walk(n)) for n in x.args)
    return None if a == b else (x.args[0], x.args[1]) if a else (x.args[1], x.args[0])


def inequality(atom: Expr) -> Expr | None:
    """x of an atom `0 <= x`, None for an opaque atom."""
    if isinstance(atom, Op) and atom.name == "le" and atom.args[0] is ZERO:
        return atom.args[1]
    return None


def settled(p: Expr, extents: Extents) -> bool | None:
    """What the extents prove an integer comparison to be, None for anything else."""
    if not isinstance(p, Op) or p.name not in ("lt", "le", "eq", "ne") or p.args[0].kind != "int":
        return None
    a, b = p.args
    if p.name in ("eq", "ne"):
        if not poly(sub(b, a)):
            return p.name == "eq"
        apart = less_than(a, b, extents) or less_than(b, a, extents)
        return p.name == "ne" if apart else None
    below, above = (less_than(a, b, extents), nonnegative(sub(a, b), extents)) if p.name == "lt" else (
        nonnegative(sub(b, a), extents), less_than(b, a, extents)
    )  # fmt: skip
    return True if below else False if above else None
