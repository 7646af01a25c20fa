"""Index algebra: integer expressions as polynomials over indices and sizes, and what their ranges prove.

Everything here is conservative: `None` and `False` mean "not proven".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from attncc.ir.build import ZERO, add, const, floordiv, mod, mul, sub
from attncc.ir.expr import Const, Expr, Op, Size, rewrite

Monomial = tuple[Expr, ...]  # factors, ordered by their text; () is the constant term
Poly = dict[Monomial, int]
Extents = Mapping[Expr, Expr]  # index -> its extent


def _sort_key(x: Expr) -> str:
    return repr(x)


def poly(x: Expr) -> Poly:
    """`x` as a sum of integer multiples of products of atoms (indices, sizes, opaque subexpressions)."""
    match x:
        case Const(value):
            return {(): int(value)} if value else {}
        case Op("add", (a, b)):
            return _plus(poly(a), poly(b), 1)
        case Op("sub", (a, b)):
            return _plus(poly(a), poly(b), -1)
        case Op("neg", (a,)):
            return _plus({}, poly(a), -1)
        case Op("mul", (a, b)):
            return _times(poly(a), poly(b))
        case _:
            return {(x,): 1}


def _plus(p: Poly, q: Poly, sign: int) -> Poly:
    out = Counter(p)
    for m, c in q.items():
        out[m] += sign * c
    return {m: c for m, c in out.items() if c}


def _times(p: Poly, q: Poly) -> Poly:
    out: Counter[Monomial] = Counter()
    for m, c in p.items():
        for n, d in q.items():
            out[tuple(sorted((*m, *n), key=_sort_key))] += c * d
    return {m: c for m, c in out.items() if c}


def expr(p: Poly) -> Expr:
    """The canonical expression of a polynomial: terms by text, constant last, negative terms subtracted."""
    result: Expr = ZERO
    for m in sorted(p, key=lambda m: (p[m] < 0, m == (), [_sort_key(f) for f in m])):
        c = abs(p[m])
        term: Expr = const(c)
        if m:
            term = m[0]
            for factor in m[1:]:
                term = mul(term, factor)
            term = term if c == 1 else mul(term, const(c))
        result = add(result, term) if p[m] > 0 else sub(result, term)
    return result


def linear_in(x: Expr, index: Expr) -> tuple[Poly, Poly] | None:
    """`(a, b)` with x = a * index + b and neither mentioning `index`, or None."""
    a: Poly = {}
    b: Poly = {}
    for m, c in poly(x).items():
        if m.count(index) == 1 and not any(_mentions(f, index) for f in m if f is not index):
            rest = list(m)
            rest.remove(index)
            a[tuple(rest)] = a.get(tuple(rest), 0) + c
        elif any(_mentions(f, index) for f in m):
            return None
        else:
            b[m] = c
    return a, b


def _mentions(x: Expr, index: Expr) -> bool:
    return x is index or any(_mentions(c, index) for c in x.children)


def upper(p: Poly, extents: Extents) -> Poly | None:
    """A polynomial without indices that is >= p for all index values (sizes are >= 1), or None."""
    return _bound(p, extents, up=True)


def lower(p: Poly, extents: Extents) -> Poly | None:
    """A polynomial without indices that is <= p for all index values, or None."""
    return _bound(p, extents, up=False)


def _bound(p: Poly, extents: Extents, *, up: bool) -> Poly | None:
    out: Poly = {}
    for m, c in p.items():
        term: Poly = {(): c}
        for factor in m:
            if isinstance(factor, Size):
                term = _times(term, {(factor,): 1})
                continue
            top = _largest(factor, extents)
            if top is None:
                return None
            term = _times(term, top) if (c > 0) == up else {}
        out = _plus(out, term, 1)
    return out


def _largest(factor: Expr, extents: Extents) -> Poly | None:
    """The largest value of a factor whose smallest is 0."""
    if factor in extents:
        return _plus(poly(extents[factor]), {(): 1}, -1)
    if isinstance(factor, Op) and factor.name == "mod" and _positive(poly(factor.args[1])):
        return _plus(poly(factor.args[1]), {(): 1}, -1)
    if isinstance(factor, Op) and factor.name == "floordiv" and nonnegative(factor.args[0], extents):
        top = upper(poly(factor.args[0]), extents)
        if top is not None and set(top) <= {()} and isinstance(factor.args[1], Const):
            return {(): top.get((), 0) // int(factor.args[1].value)}
    return None


def _positive(p: Poly) -> bool:
    """p >= 1 whenever sizes are >= 1: the coefficients of size monomials are >= 0 and all together sum to >= 1."""
    sizes_only = all(isinstance(f, Size) for m in p for f in m)
    return sizes_only and all(c >= 0 for m, c in p.items() if m) and sum(p.values()) >= 1


def nonnegative(x: Expr, extents: Extents) -> bool:
    """Whether x >= 0 is proven for all index values."""
    low = lower(poly(x), extents)
    return low is not None and _positive(_plus(low, {(): 1}, 1))


def less_than(x: Expr, bound: Expr, extents: Extents) -> bool:
    """Whether x < bound is proven for all index values."""
    top = upper(_plus(poly(x), poly(bound), -1), extents)
    return top is not None and _positive(_plus({}, top, -1))


def divide(x: Expr, by: Expr, extents: Extents) -> tuple[Expr, Expr]:
    """(x // by, x % by) with the terms that `by` divides taken out, for by >= 1."""
    if isinstance(by, Const) and by.value == 1:
        return x, ZERO
    divisor = poly(by)
    quotient: Poly = {}
    rest: Poly = {}
    for m, c in poly(x).items():
        whole = _divide_term(m, c, divisor)
        if whole is None:
            rest[m] = c
        else:
            quotient = _plus(quotient, {whole[0]: whole[1]}, 1)
    remainder = expr(rest)
    if nonnegative(remainder, extents) and less_than(remainder, by, extents):
        return expr(quotient), remainder
    if quotient and not rest:
        return expr(quotient), ZERO
    return add(expr(quotient), floordiv(remainder, by)), mod(remainder, by)


def _divide_term(m: Monomial, c: int, divisor: Poly) -> tuple[Monomial, int] | None:
    if len(divisor) != 1:
        return None
    ((by, factor),) = divisor.items()
    left = list(m)
    for f in by:
        if f not in left:
            return None
        left.remove(f)
    return (tuple(left), c // factor) if c % factor == 0 else None


def simplify(x: Expr, extents: Extents) -> Expr:
    """`x` with its integer subexpressions in canonical form and every provable floor and modulus removed."""

    def rule(n: Expr) -> Expr | None:
        if not isinstance(n, Op) or n.kind != "int":
            return None
        if n.name == "floordiv" and _positive(poly(n.args[1])):
            return divide(n.args[0], n.args[1], extents)[0]
        if n.name == "mod" and _positive(poly(n.args[1])):
            return divide(n.args[0], n.args[1], extents)[1]
        return expr(poly(n)) if n.name in ("add", "sub", "mul", "neg") else None

    return rewrite(x, rule)


