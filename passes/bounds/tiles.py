"""The smallest and largest value of a row expression over the rows of a tile, in closed form.

Floor division, truncation of non-negatives, minimum and maximum are monotone, so their extremes are taken at an end of
the tile; sums take the extremes of their terms, which is exact while all of them move the same way.
"""

from __future__ import annotations

from dataclasses import dataclass

from attncc.ir.affine import Extents, Poly, expr, is_positive, nonnegative, plus, poly, scaled
from attncc.ir.build import ONE, ZERO, add, eq, floordiv, maximum, minimum, mod, mul, op, sub, where
from attncc.ir.expr import Const, Expr, Op, Size, mentions, substitute


@dataclass(frozen=True)
class TileRows:
    """Rows first <= i <= last of the row index `i`; `extents` are for proofs about single rows."""

    i: Expr
    first: Expr
    last: Expr
    extents: Extents

    def least(self, x: Expr) -> Expr | None:
        """An expression over the tile that is <= x on all of its rows, or None."""
        return self._extreme(x, low=True)

    def most(self, x: Expr) -> Expr | None:
        """An expression over the tile that is >= x on all of its rows, or None."""
        return self._extreme(x, low=False)

    def _extreme(self, x: Expr, *, low: bool) -> Expr | None:
        if not mentions(x, self.i):
            return x
        if x is self.i:
            return self.first if low else self.last
        direction = trend(x, self.i, self.extents)
        if direction is not None:
            return substitute(x, {self.i: self.first if (direction >= 0) == low else self.last})
        match x:
            case Op(("floordiv" | "truncdiv") as name, (a, c)):
                if not is_positive(poly(c)):
                    return None
                inner = self._extreme(a, low=low)
                return None if inner is None else op(name, inner, c)
            case Op("mod", (a, c)) if is_positive(poly(c)):
                return self._wrapped(a, c, low=low)
            case Op(("min" | "max") as name, (a, b)):
                first, second = self._extreme(a, low=low), self._extreme(b, low=low)
                if first is not None and second is not None:
                    return op(name, first, second)
                known = first if first is not None else second
                return known if low == (name == "max") else None  # max(a, b) >= a
            case Op("where", (_, a, b)):
                first, second = self._extreme(a, low=low), self._extreme(b, low=low)
                if first is None or second is None:
                    return None
                return minimum(first, second) if low else maximum(first, second)
            case Op("abs", (a,)):
                down, up = self.least(a), self.most(a)
                if low:
                    floor = ZERO if down is None else maximum(ZERO, down)
                    return floor if up is None else maximum(floor, sub(ZERO, up))
                return None if down is None or up is None else maximum(up, sub(ZERO, down))
            case Op("int", (a,)) if a.kind == "bool":
                return ZERO if low else ONE
            case _:
                return self._sum(poly(x), low=low) if _is_sum(x) else None

    def _wrapped(self, a: Expr, c: Expr, *, low: bool) -> Expr:
        """a % c: its ends where the tile stays in one period, else the whole period."""
        down, up = self.least(a), self.most(a)
        anything = ZERO if low else sub(c, ONE)
        if down is None or up is None:
            return anything
        return where(eq(floordiv(down, c), floordiv(up, c)), mod(down if low else up, c), anything)

    def _sum(self, p: Poly, *, low: bool) -> Expr | None:
        total: Expr = ZERO
        for m, c in p.items():
            moving = [f for f in m if mentions(f, self.i)]
            factor: Expr = ONE
            if moving:
                if len(moving) > 1 or not all(isinstance(f, Size) for f in m if f is not moving[0]):
                    return None
                found = self._extreme(moving[0], low=low == (c > 0))
                if found is None:
                    return None
                factor = found
            for f in m:
                factor = factor if f in moving else mul(factor, f)
            total = add(total, mul(factor, Const(c)))
        return total


def _is_sum(x: Expr) -> bool:
    return isinstance(x, Op) and x.name in ("add", "sub", "mul", "neg")


def trend(x: Expr, i: Expr, extents: Extents) -> int | None:
    """1 where `x` never falls as `i` grows, -1 where it never rises, 0 where `i` does not occur, None: unproven."""
    if not mentions(x, i):
        return 0
    if x is i:
        return 1
    match x:
        case Op("floordiv" | "truncdiv", (a, c)) if is_positive(poly(c)):
            return trend(a, i, extents)
        case Op("min" | "max", (a, b)):
            found = _together([trend(a, i, extents), trend(b, i, extents)])
        case _ if _is_sum(x):
            found = _direction(poly(x), i, extents)
        case _:
            return None
    return found if found is not None else _piecewise_trend(x, i, extents)


def _direction(p: Poly, i: Expr, extents: Extents) -> int | None:
    terms: list[int | None] = []
    for m, c in p.items():
        moving = [f for f in m if mentions(f, i)]
        if len(moving) > 1 or (moving and not all(isinstance(f, Size) for f in m if f is not moving[0])):
            return None
        if moving:
            inner = trend(moving[0], i, extents)
            terms.append(None if inner is None else inner if c > 0 else -inner)
    return _together(terms)


def _together(directions: list[int | None]) -> int | None:
    found = {d for d in directions if d != 0}
    if len(found) > 1 or None in found:
        return None
    return found.pop() if found else 0


Piece = tuple[Poly, tuple[Poly, ...]]  # a value, where all of these are >= 0
_MOST_PIECES = 16


def pieces(x: Expr, extents: Extents) -> list[Piece] | None:
    """`x` as sums without `min` and `max`, each where its branches are taken; those proven never taken are left out.
    None if there are too many."""
    result: list[Piece] = [({}, ())]
    for m, c in poly(x).items():
        factor = m[0] if len(m) == 1 else None
        term: list[Piece] | None = [({m: c}, ())]
        if isinstance(factor, Op) and factor.name in ("min", "max"):
            term = _branches(factor, c, extents)
        if term is None:
            return None
        result = [(plus(p, q), (*u, *v)) for p, u in result for q, v in term]
        result = [(p, u) for p, u in result if not _excluded(u, extents)]
        if len(result) > _MOST_PIECES:
            return None
    return result


def _branches(x: Op, c: int, extents: Extents) -> list[Piece] | None:
    first, second = pieces(x.args[0], extents), pieces(x.args[1], extents)
    if first is None or second is None:
        return None
    found: list[Piece] = []
    for p, u in first:
        for q, v in second:
            ahead = plus(p, scaled(q, -1)) if x.name == "max" else plus(q, scaled(p, -1))
            behind = plus(scaled(ahead, -1), {(): -1})
            found += [(scaled(p, c), (*u, *v, ahead)), (scaled(q, c), (*u, *v, behind))]
    return found


def _excluded(conditions: tuple[Poly, ...], extents: Extents) -> bool:
    """Whether some condition, or two of them together, are proven never to hold."""
    for at, p in enumerate(conditions):
        for q in ({}, *conditions[at + 1 :]):
            if nonnegative(expr(plus(scaled(plus(p, q), -1), {(): -1})), extents):
                return True
    return False


def _piecewise_trend(x: Expr, i: Expr, extents: Extents) -> int | None:
    """The trend of a function of one monotone quantity that bends but does not jump: that of all its pieces."""
    found = pieces(x, extents)
    if found is None or len(_moving(found, i)) != 1:
        return None
    return _together([_direction(p, i, extents) for p, _ in found])


def _moving(found: list[Piece], i: Expr) -> set[Expr]:
    """The factors that depend on `i` in the values and conditions of all pieces."""
    return {f for p, u in found for q in (p, *u) for m in q for f in m if mentions(f, i)}


def rise(x: Expr, i: Expr, extents: Extents) -> Poly | None:
    """A bound over sizes on x(i + 1) - x(i) for a never falling `x`, or None."""
    if not mentions(x, i):
        return {}
    if x is i:
        return {(): 1}
    if isinstance(x, Op) and x.name in ("floordiv", "truncdiv") and is_positive(poly(x.args[1])):
        inner, c = rise(x.args[0], i, extents), x.args[1]
        if inner is None or set(inner) > {()}:
            return None
        step = inner.get((), 0)
        return {(): -(-step // int(c.value)) if isinstance(c, Const) else step}
    found = pieces(x, extents)
    if found is None or (len(found) > 1 and len(_moving(found, i)) != 1):
        return None
    steps: list[Poly] = []
    for p, _ in found:
        total: Poly = {}
        for m, c in p.items():
            for f in m:
                if mentions(f, i):
                    inner = rise(f, i, extents) if f is not x else None
                    if inner is None or c < 0 or trend(f, i, extents) != 1:
                        return None
                    term: Expr = mul(expr(inner), Const(c))
                    for other in m:
                        term = term if other is f else mul(term, other)
                    total = plus(total, poly(term))
        steps.append(total)
    most = steps[0]
    for step in steps[1:]:
        if nonnegative(expr(plus(step, scaled(most, -1))), {}):
            most = step
        elif not nonnegative(expr(plus(most, scaled(step, -1))), {}):
            return None
    return most


def contiguous(lo: tuple[Expr, ...], hi: tuple[Expr, ...], i: Expr, extents: Extents) -> bool:
    """Whether the union over any run of rows of max(lo) <= j < min(hi) is proven to be one interval whose ends are
    those of the tile's extremes: both ends monotone and, where they move the same way, no gap from row to row."""
    low, high = _together([trend(x, i, extents) for x in lo]), _together([trend(x, i, extents) for x in hi])
    if low is None or high is None:
        return False
    if low == 0 or high == 0 or low != high:
        return True
    for a in lo:
        for b in hi:
            if trend(a, i, extents) == 0 or trend(b, i, extents) == 0:
                continue
            step = rise(a if low > 0 else b, i, extents) if low > 0 else _fall(b, i, extents)
            if step is None:
                return False
            if not nonnegative(sub(sub(b, a), expr(step)), extents):
                return False
    return True


def _fall(x: Expr, i: Expr, extents: Extents) -> Poly | None:
    return rise(expr(poly(sub(ZERO, x))), i, extents)

