"""What an expression comes to where conditions are known: branches that cannot be reached are dropped.

Conditions are comparisons of integers. Whether several can hold together is linear arithmetic over integers: each is a
row `coefficients . variables + constant >= 0`; one variable after the other is eliminated (Fourier and Motzkin), rows
being divided by the common factor of their coefficients and rounded. A floor or a modulus by a number is a variable of
its own between two rows; what is not understood is a variable that may have any value. All answers are conservative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

from attncc.ir.affine import Monomial, Poly, at_least_one, expr, plus, poly, scaled
from attncc.ir.analysis import members
from attncc.ir.build import ONE, add, and_, const, eq, floordiv, ge, mod, mul, not_, op, sub, where
from attncc.ir.expr import Const, Expr, Index, Load, Op, Size, rewrite

Context = tuple[Expr, ...]
#: Sees a load and what is known where it is read.
Leaf = Callable[[Load, Context], Expr | None]
#: With more rows, or more cases, a question is left open.
_MOST_ROWS, _MOST_CASES = 120, 300


class Reach:
    """Reasoning over indices below their extents."""

    def __init__(self, extents: Mapping[Expr, Expr]) -> None:
        self.extents = extents
        self._known: dict[Context, bool] = {}
        self._cases: dict[Expr, list[list[Poly]]] = {}
        self._done: dict[tuple[Expr, Context], Expr] = {}

    def possible(self, context: Context) -> bool:
        """Whether all conditions may hold at some point; True where that cannot be told."""
        found = self._known.get(context)
        if found is None:
            found = self._known[context] = _Search(self.extents).possible([self._alternatives(c) for c in context])
        return found

    def _alternatives(self, c: Expr) -> list[list[Poly]]:
        found = self._cases.get(c)
        if found is None:
            found = self._cases[c] = _cases(rewrite(c, _near), True)
        return found

    def proves(self, context: Context, c: Expr) -> bool:
        return not self.possible((*context, not_(c)))

    def branch(self, x: Expr, context: Context) -> Expr:
        """What a selection comes to where the conditions hold, if one of its branches is not reached."""
        if not (isinstance(x, Op) and x.name == "where"):
            return x
        c, yes, no = x.args
        return yes if self.proves(context, c) else no if self.proves(context, not_(c)) else x

    def simplified(self, x: Expr, context: Context = (), leaf: Leaf | None = None) -> Expr:
        """`x` where the conditions hold."""
        if isinstance(x, Const | Index | Size) or not x.children:
            return x
        found = self._done.get((x, context)) if leaf is None else None
        if found is None:
            found = self._simplified(x, context, leaf)
            if leaf is None:
                self._done[x, context] = found
        return found

    def _simplified(self, x: Expr, context: Context, leaf: Leaf | None) -> Expr:
        if isinstance(x, Load):
            replaced = None if leaf is None else leaf(x, context)
            index = tuple(self.simplified(i, context, leaf) for i in x.index)
            return Load(x.tensor, index, x.kind) if replaced is None else replaced
        assert isinstance(x, Op)
        if x.name == "where":
            return self._selected(x, context, leaf)
        args = tuple(self.simplified(a, context, leaf) for a in x.args)
        new = op(x.name, *args)
        match new:
            case Op("min" | "max", (a, b)) if new.kind == "int":
                least = new.name == "min"
                chosen = ((p, ge(q, p) if least else ge(p, q)) for p, q in ((a, b), (b, a)))
                return next((p for p, known in chosen if self.proves(context, known)), new)
            case Op("floordiv" | "mod", (a, Const(by))) if by > 0:
                whole, rest = _nearest(poly(a), int(by))
                for more in (0, 1):
                    if self.proves(context, eq(floordiv(rest, const(by)), const(more))):
                        return add(whole, const(more)) if x.name == "floordiv" else sub(rest, const(more * by))
                return new
            case _:
                return new

    def _selected(self, x: Op, context: Context, leaf: Leaf | None) -> Expr:
        c, a, b = x.args
        c = self.simplified(c, context, leaf)
        for known, branch in ((c, a), (not_(c), b)):
            if self.proves(context, known):
                return self.simplified(branch, context, leaf)
        yes = self.simplified(a, (*context, c), leaf)
        no = self.simplified(b, (*context, not_(c)), leaf)
        return yes if yes is no else where(self.needed(c, context), yes, no)

    def needed(self, c: Expr, context: Context) -> Expr:
        """A conjunction without the parts that the context, or the other parts, imply."""
        parts = members("and", c)
        kept = list(parts)
        for part in parts if len(parts) > 1 else ():
            rest = [p for p in kept if p is not part]
            if self.proves((*context, *rest), part):
                kept = rest
        return and_(*kept)


def _near(x: Expr) -> Expr | None:
    """A quotient or remainder by a number with numbers near zero in what is divided."""
    match x:
        case Op("floordiv" | "mod", (a, Const(by))) if by > 0:
            whole, rest = _nearest(poly(a), int(by))
            return add(whole, floordiv(rest, const(by))) if x.name == "floordiv" else mod(rest, const(by))
        case _:
            return None


def _nearest(p: Poly, by: int) -> tuple[Expr, Expr]:
    """(q, r) with p = q * by + r, the coefficients of r as near to zero as can be, its constant from 0 to by."""
    whole = {m: (c + by // 2 if m else c) // by for m, c in p.items()}
    whole = {m: c for m, c in whole.items() if c}
    return expr(whole), expr(plus(p, scaled(whole, -by)))


def _cases(c: Expr, truth: bool) -> list[list[Poly]]:
    """The alternatives under which a condition is (not) met, each as polynomials that are >= 0."""
    match c:
        case Const(value):
            return [[]] if bool(value) == truth else []
        case Op("not", (a,)):
            return _cases(a, not truth)
        case Op("and" | "or", (a, b)):
            left, right = _cases(a, truth), _cases(b, truth)
            return [x + y for x in left for y in right] if (c.name == "and") == truth else left + right
        case Op("lt" | "le", (a, b)) if a.kind == "int":
            above = plus(poly(b), poly(a), -1)
            if not truth:
                above = scaled(above, -1)
            strict = (c.name == "lt") == truth
            return [[plus(above, {(): 1}, -1) if strict else above]]
        case Op("eq" | "ne", (a, b)) if a.kind == "int":
            above = plus(poly(b), poly(a), -1)
            below = scaled(above, -1)
            if (c.name == "eq") == truth:
                return [[above, below]]
            return [[plus(above, {(): 1}, -1)], [plus(below, {(): 1}, -1)]]
        case _:
            return [[{(c,): 1, (): -1}] if truth else [{(c,): -1}]]


class _Search:
    """One question: the alternatives of each condition are tried together."""

    def __init__(self, extents: Mapping[Expr, Expr]) -> None:
        self.extents, self.ones, self.left = extents, at_least_one(extents), _MOST_CASES

    def possible(self, conditions: list[list[list[Poly]]]) -> bool:
        rows = [p for cases in conditions if len(cases) == 1 for p in cases[0]]
        several = sorted((cases for cases in reversed(conditions) if len(cases) != 1), key=len)  # what is asked first
        return self._possible(rows, several)

    def _possible(self, rows: list[Poly], several: list[list[list[Poly]]]) -> bool:
        self.left -= 1
        if self.left < 0:
            return True
        if _contradict([*rows, *self._axioms(rows)]):
            return False
        return not several or any(self._possible(rows + case, several[1:]) for case in several[0])

    def _axioms(self, rows: list[Poly]) -> list[Poly]:
        """What is known of the variables in the rows, and of those that this brings in."""
        found: list[Poly] = []
        seen: set[Monomial] = {()}
        stack = [m for p in rows for m in p]
        while stack:
            m = stack.pop()
            if m in seen:
                continue
            seen.add(m)
            more = self._of_variable(m[0]) if len(m) == 1 else []
            found += more
            stack += [n for p in more for n in p]
        return found

    def _of_variable(self, x: Expr) -> list[Poly]:
        if isinstance(x, Size):
            return [{(x,): 1, (): -1} if x in self.ones else {(x,): 1}]
        if x in self.extents:
            return [{(x,): 1}, poly(sub(sub(self.extents[x], x), ONE))]
        match x:
            case Op("floordiv", (a, Const(by))) if by > 0:
                low = sub(a, mul(x, const(int(by))))
                return [poly(low), poly(sub(const(int(by) - 1), low))]
            case Op("mod", (a, Const(by))) if by > 0:
                whole = mul(floordiv(a, const(int(by))), const(int(by)))
                same = poly(sub(sub(a, whole), x))
                return [same, scaled(same, -1)]
            case Op("min" | "max", (a, b)) if x.kind == "int":
                sign = 1 if x.name == "min" else -1
                return [scaled(poly(sub(y, x)), sign) for y in (a, b)]
            case _:
                return [{(x,): 1}, {(x,): -1, (): 1}] if x.kind == "bool" else []


def _contradict(polys: Iterable[Poly]) -> bool:
    """Whether no integers make all polynomials >= 0, their monomials taken for variables."""
    rows: dict[frozenset[tuple[Monomial, int]], int] = {}
    for p in polys:
        if _add(rows, {m: c for m, c in p.items() if m}, p.get((), 0)):
            return True
    while rows:
        held: dict[Monomial, list[int]] = {}
        for row in rows:
            for m, c in row:
                held.setdefault(m, []).append(c)
        chosen = min(held, key=lambda m: _cost(m, held[m]))
        above = [(dict(row), c) for row, c in rows.items() if dict(row).get(chosen, 0) > 0]
        below = [(dict(row), c) for row, c in rows.items() if dict(row).get(chosen, 0) < 0]
        rows = {row: c for row, c in rows.items() if not any(m == chosen for m, _ in row)}
        if len(rows) + len(above) * len(below) > _MOST_ROWS:
            return False
        for p, c in above:
            for q, d in below:
                joined = plus(scaled(p, -q[chosen]), scaled(q, p[chosen]))
                if _add(rows, joined, c * -q[chosen] + d * p[chosen]):
                    return True
    return False


def _cost(m: Monomial, coefficients: list[int]) -> tuple[bool, int, int]:
    """Variables whose coefficients are 1 go first: only that loses no integers. Quotients go last, as rows of their
    whole multiples are rounded."""
    above = sum(c > 0 for c in coefficients)
    below = len(coefficients) - above
    quotient = any(isinstance(x, Op) and x.name == "floordiv" for x in m)
    return quotient, max(map(abs, coefficients)), above * below - above - below


def _add(rows: dict[frozenset[tuple[Monomial, int]], int], p: Poly, constant: int) -> bool:
    """Add the row p + constant >= 0, tightened to integers; whether it is a contradiction in itself."""
    if not p:
        return constant < 0
    factor = math.gcd(*p.values())
    key = frozenset((m, c // factor) for m, c in p.items())
    constant = constant // factor
    opposite = rows.get(frozenset((m, -c) for m, c in key))
    if opposite is not None and opposite + constant < 0:
        return True
    rows[key] = min(constant, rows.get(key, constant))
    return False


