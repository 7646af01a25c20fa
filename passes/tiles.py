"""The smallest and largest value of a row expression over the rows of a tile, in closed form.

Floor division, truncation of non-negatives, minimum and maximum are monotone, so their extremes are taken at an end of
the tile; sums take the extremes of their terms, which is exact while all of them move the same way.
"""

from __future__ import annotations

from dataclasses import dataclass

from attncc.ir.affine import Extents, Poly, expr, is_positive, nonnegative, poly
from attncc.ir.build import ONE, ZERO, add, eq, floordiv, maximum, minimum, mod, mul, op, sub, where
from attncc.ir.expr import Const, Expr, Op, Size, substitute
from attncc.passes.predicates import mentions


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
            return _together([trend(a, i, extents), trend(b, i, extents)])
        case _ if _is_sum(x):
            terms: list[int | None] = []
            for m, c in poly(x).items():
                moving = [f for f in m if mentions(f, i)]
                if len(moving) > 1 or (moving and not all(isinstance(f, Size) for f in m if f is not moving[0])):
                    return None
                if moving:
                    if moving[0] is x:
                        return None
                    inner = trend(moving[0], i, extents)
                    terms.append(None if inner is None else inner if c > 0 else -inner)
            return _together(terms)
        case _:
            return None


def _together(directions: list[int | None]) -> int | None:
    found = {d for d in directions if d != 0}
    if len(found) > 1 or None in found:
        return None
    return found.pop() if found else 0


def rise(x: Expr, i: Expr, extents: Extents) -> Poly | None:
    """A bound over sizes on x(i + 1) - x(i) for a never falling `x`, or None."""
    if not mentions(x, i):
        return {}
    if x is i:
        return {(): 1}
    match x:
        case Op("floordiv" | "truncdiv", (a, c)) if is_positive(poly(c)):
            inner = rise(a, i, extents)
            if inner is None or set(inner) > {()}:
                return None
            step = inner.get((), 0)
            return {(): -(-step // int(c.value)) if isinstance(c, Const) else step}
        case _ if _is_sum(x):
            total: Expr = ZERO
            for m, c in poly(x).items():
                for f in m:
                    if mentions(f, i):
                        inner = rise(f, i, extents)
                        if inner is None or c < 0 or trend(f, i, extents) != 1:
                            return None
                        term = mul(expr(inner), Const(c))
                        for other in m:
                            term = term if other is f else mul(term, other)
                        total = add(total, term)
            return poly(total)
        case _:
            return None


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

