"""Index algebra: integer expressions as polynomials over indices and sizes, and what their ranges prove.

Everything here is conservative: `None` and `False` mean "not proven". Sizes are >= 0; those that are the extent of an
index, or that something is divided by, are >= 1 (without, there is nothing to prove anything about).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

from attncc.ir.build import ONE, ZERO, add, const, floordiv, mod, mul, sub
from attncc.ir.expr import Const, Expr, Op, Size, mentions, rewrite, walk

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
            return plus(poly(a), poly(b), 1)
        case Op("sub", (a, b)):
            return plus(poly(a), poly(b), -1)
        case Op("neg", (a,)):
            return plus({}, poly(a), -1)
        case Op("mul", (a, b)):
            return _times(poly(a), poly(b))
        case _:
            return {(x,): 1}


def plus(p: Poly, q: Poly, sign: int = 1) -> Poly:
    """p + sign * q."""
    out = dict(p)
    for m, c in q.items():
        total = out.get(m, 0) + sign * c
        if total:
            out[m] = total
        else:
            out.pop(m, None)
    return out


def _times(p: Poly, q: Poly) -> Poly:
    out: Poly = {}
    for m, c in p.items():
        for n, d in q.items():
            factors = (*m, *n)
            both = factors if len(factors) < 2 else tuple(sorted(factors, key=_sort_key))
            out[both] = out.get(both, 0) + c * d
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
        if m.count(index) == 1 and not any(mentions(f, index) for f in m if f is not index):
            rest = list(m)
            rest.remove(index)
            a[tuple(rest)] = a.get(tuple(rest), 0) + c
        elif any(mentions(f, index) for f in m):
            return None
        else:
            b[m] = c
    return a, b


def upper(p: Poly, extents: Extents) -> Poly | None:
    """A polynomial over sizes alone that is >= p for all index values, or None."""
    low = lower(scaled(p, -1), extents)
    return None if low is None else scaled(low, -1)


def lower(p: Poly, extents: Extents) -> Poly | None:
    """A polynomial over sizes alone that is <= p for all index values, or None."""
    out: Poly = {}
    for m, c in _at_their_ends(p, extents).items():
        sizes = tuple(f for f in m if isinstance(f, Size))
        others = [f for f in m if not isinstance(f, Size)]
        ends = [ends_of(f, extents) for f in others]
        term: Poly | None = {(): 1}
        if len(others) == 1:
            term = ends[0][0] if c > 0 else ends[0][1]
        elif others:
            if not all(low is not None and never_negative(low, at_least_one(extents)) for low, _ in ends):
                return None
            for low, high in ends:
                end = low if c > 0 else high
                term = None if term is None or end is None else _times(term, end)
        if term is None:
            return None
        out = plus(out, _times(term, {sizes: c}), 1)
    return out


def _at_their_ends(p: Poly, extents: Extents) -> Poly:
    """p with 0 or the last value, whichever makes it less, for each index that only sizes and extents are multiplied
    with. An extent that is a quotient may then meet itself and cancel, before it is bounded as any other."""
    out: Poly = {}
    lengths = set(extents.values())
    for m, c in p.items():
        others = [f for f in m if not isinstance(f, Size) and f not in lengths]
        alone = len(others) == 1 and others[0] in extents
        if alone and c < 0:
            out = plus(out, _times({_less(m, others[0]): c}, plus(poly(extents[others[0]]), {(): 1}, -1)))
        elif not alone:
            out = plus(out, {m: c})
    return out


Ends = tuple[Poly | None, Poly | None]

#: Factors whose ends are remembered for the same extents: minima in minima would be asked for theirs twice each, and so
#: 2^n times.
_MOST_ENDS = 4096


@lru_cache(maxsize=32)
def _known_ends(_extents: frozenset[tuple[Expr, Expr]]) -> dict[Expr, Ends]:
    return {}


def ends_of(factor: Expr, extents: Extents) -> Ends:
    """The smallest and largest value of a factor that is no size, where known."""
    known = _known_ends(frozenset(extents.items()))
    found = known.get(factor)
    if found is None:
        found = _ends(factor, extents)
        if len(known) >= _MOST_ENDS:
            known.clear()
        known[factor] = found
    return found


def _ends(factor: Expr, extents: Extents) -> Ends:
    if factor in extents:
        return {}, plus(poly(extents[factor]), {(): 1}, -1)
    match factor:
        case Op("mod", (_, c)) if is_positive(poly(c)):
            return {}, plus(poly(c), {(): 1}, -1)
        case Op("floordiv" | "truncdiv", (x, Const(c))) if int(c) > 0:
            low, high = lower(poly(x), extents), upper(poly(x), extents)
            whole = low is not None and never_negative(low, at_least_one(extents))
            if factor.name == "truncdiv" and not whole:
                return None, None
            return (_over(low, int(c)) or ({} if whole else None)), _over(high, int(c))
        case Op("floordiv" | "truncdiv", (x, c)) if is_positive(poly(c)) and nonnegative(x, extents):
            return {}, upper(poly(x), extents)
        case Op("min" | "max", (x, y)) if factor.kind == "int":
            lows, highs = ([end(poly(z), extents) for z in (x, y)] for end in (lower, upper))
            if factor.name == "max":
                return _of_any(lows, max), _of_all(highs, max)
            return _of_all(lows, min), _of_any(highs, min)
        case Op("int", (x,)) if x.kind == "bool":
            return {}, {(): 1}
        case _:
            return None, None


def _over(p: Poly | None, c: int) -> Poly | None:
    """p // c where p is a number."""
    return {(): p.get((), 0) // c} if p is not None and set(p) <= {()} else None


def _of_any(ends: list[Poly | None], best: Callable[[list[int]], int]) -> Poly | None:
    """The best of the ends that are known, any of which is one."""
    known = [p for p in ends if p is not None]
    found = _of_all(known, best)
    return found if found is not None or not known else known[0]


def _of_all(ends: Sequence[Poly | None], best: Callable[[list[int]], int]) -> Poly | None:
    """The best of all ends, where they are numbers."""
    if not ends or any(p is None or not set(p) <= {()} for p in ends):
        return None
    value = best([p.get((), 0) for p in ends if p is not None])
    return {(): value} if value else {}


def scaled(p: Poly, by: int) -> Poly:
    """p * by, for by != 0."""
    return {m: c * by for m, c in p.items()}


def is_positive(p: Poly) -> bool:
    """p >= 1 for a divisor, whose sizes are >= 1."""
    return never_negative(plus(p, {(): -1}), frozenset(f for m in p for f in m))


def never_negative(p: Poly, ones: frozenset[Expr]) -> bool:
    """p >= 0 over sizes of which `ones` are >= 1: as a polynomial in those less one, all coefficients are >= 0."""
    if not all(isinstance(f, Size) for m in p for f in m):
        return False
    if all(c >= 0 for c in p.values()):
        return True
    if p.get((), 0) + sum(c for m, c in p.items() if ones.issuperset(m) and m) < 0:
        return False
    shifted: Poly = {}
    for m, c in p.items():
        term: Poly = {(): c}
        for f in m:
            term = _times(term, {(): 1, (f,): 1} if f in ones else {(f,): 1})
        shifted = plus(shifted, term)
    return all(c >= 0 for c in shifted.values())


def at_least_one(extents: Extents, *xs: Expr) -> frozenset[Expr]:
    """The sizes that are an extent, or a divisor in `xs`."""
    found = {n for n in extents.values() if isinstance(n, Size)}
    for x in walk(*xs):
        if isinstance(x, Op) and x.name in ("floordiv", "truncdiv", "mod") and isinstance(x.args[1], Size):
            found.add(x.args[1])
    return frozenset(found)


_MOST_SPLITS = 6


def nonnegative(x: Expr, extents: Extents) -> bool:
    """Whether x >= 0 is proven for all index values."""
    return _nonnegative(poly(x), extents, at_least_one(extents, x), _MOST_SPLITS)


def _nonnegative(p: Poly, extents: Extents, ones: frozenset[Expr], splits: int) -> bool:
    low = lower(p, extents)
    if low is not None and never_negative(low, ones):
        return True
    if splits == 0:
        return False
    for m, c in p.items():
        for f in m:
            if not isinstance(f, Op):
                continue
            rest = {n: d for n, d in p.items() if n != m}
            others = list(m)
            others.remove(f)
            if f.name in ("min", "max", "where") and all(isinstance(n, Size) for n in others):
                scale: Poly = {tuple(others): c}
                whole_terms = (plus(rest, _times(scale, poly(a))) for a in f.args[-2:])
                cases = (_nonnegative(n, extents, ones, splits - 1) for n in whole_terms)
                both = f.name == "where" or (f.name == "min") == (c > 0)
                return all(cases) if both else any(cases)
            if f.name == "floordiv" and is_positive(poly(f.args[1])):
                whole = _divide_term(tuple(others), c, poly(f.args[1]))  # c * others = whole * divisor
                if whole is None:
                    # n // divisor <= n for n >= 0
                    if c < 0 and all(isinstance(n, Size) for n in others) and nonnegative(f.args[0], extents):
                        relaxed = plus(rest, _times({tuple(others): c}, poly(f.args[0])))
                        if _nonnegative(relaxed, extents, ones, splits - 1):
                            return True
                    continue
                # divisor * (n // divisor) lies in [n - divisor + 1, n]
                near = poly(f.args[0])
                if c > 0:
                    near = plus(plus(near, poly(f.args[1]), -1), {(): 1}, 1)
                relaxed = plus(rest, _times({whole[0]: whole[1]}, near), 1)
                if all(isinstance(n, Size) for n in whole[0]) and _nonnegative(relaxed, extents, ones, splits - 1):
                    return True
    return False


def less_than(x: Expr, bound: Expr, extents: Extents) -> bool:
    """Whether x < bound is proven for all index values."""
    return nonnegative(sub(sub(bound, x), ONE), extents)


def divide(x: Expr, by: Expr, extents: Extents) -> tuple[Expr, Expr]:
    """(x // by, x % by) with the terms that `by` divides taken out, for by >= 1."""
    if isinstance(by, Const) and by.value == 1:
        return x, ZERO
    quotient, rest = long_division(poly(x), poly(by))
    remainder = expr(rest)
    if nonnegative(remainder, extents) and less_than(remainder, by, extents):
        return expr(quotient), remainder
    if quotient and not rest:
        return expr(quotient), ZERO
    return add(expr(quotient), floordiv(remainder, by)), mod(remainder, by)


def long_division(p: Poly, by: Poly) -> tuple[Poly, Poly]:
    """(q, r) with p = q * by + r, whose r holds no multiple of the leading term of `by`."""
    quotient: Poly = {}
    rest: Poly = {}
    degree = max(map(len, by), default=0)
    leading = [m for m in by if len(m) == degree]
    if len(leading) != 1:  # no one term leads: x / (m + n)
        return ({(): 1}, {}) if p == by else ({}, p)
    lead = {leading[0]: by[leading[0]]}
    while p:
        m = max(p, key=len)
        whole = _divide_term(m, p[m], lead)
        if whole is None:
            rest = plus(rest, {m: p[m]})
            p = plus(p, {m: p[m]}, -1)
        else:
            quotient = plus(quotient, {whole[0]: whole[1]})
            p = plus(p, _times({whole[0]: whole[1]}, by), -1)
    return quotient, rest


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


def _rejoin(p: Poly) -> Poly:
    """`x // c * c + x % c` is x: what a reshape took apart and another put together again."""
    for m, c in p.items():
        for factor in m:
            if not (isinstance(factor, Op) and factor.name == "mod"):
                continue
            x, by = factor.args
            whole = _times(_times({_less(m, factor): c}, poly(by)), {(floordiv(x, by),): 1})
            if len(whole) == 1 and all(p.get(k) == v for k, v in whole.items()):
                rest = {k: v for k, v in p.items() if k != m and k not in whole}
                return _rejoin(plus(rest, _times({_less(m, factor): c}, poly(x)), 1))
    return p


def _less(m: Monomial, factor: Expr) -> Monomial:
    rest = list(m)
    rest.remove(factor)
    return tuple(rest)


def simplify(x: Expr, extents: Extents) -> Expr:
    """`x` with its integer subexpressions in canonical form, and every floor, modulus, minimum and maximum removed that
    the extents prove to be superfluous."""

    def rule(n: Expr) -> Expr | None:
        if not isinstance(n, Op) or n.kind != "int":
            return None
        if n.name in ("min", "max"):
            a, b = n.args
            larger, smaller = (a, b) if nonnegative(sub(a, b), extents) else (b, a)
            known = larger is a or nonnegative(sub(b, a), extents)
            return None if not known else larger if n.name == "max" else smaller
        if n.name == "floordiv" and is_positive(poly(n.args[1])):
            return divide(n.args[0], n.args[1], extents)[0]
        if n.name == "mod" and is_positive(poly(n.args[1])):
            return divide(n.args[0], n.args[1], extents)[1]
        return expr(_rejoin(poly(n))) if n.name in ("add", "sub", "mul", "neg") else None

    return rewrite(x, rule)


