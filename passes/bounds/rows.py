"""What one clause says about one row: an interval of keys, perhaps striped, under conditions on the row.

    a * j + b(i) >= 0   ->  j >= ceil(-b / a)   or   j <= floor(b / -a)
    x(j) // c >= n      ->  x(j) >= n * c
    (j + r) % c in [l, u]  ->  keys in a stripe of period c, u - l + 1 wide
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from attncc.ir.affine import (
    Extents,
    Poly,
    at_least_one,
    ends_of,
    expr,
    is_positive,
    never_negative,
    nonnegative,
    plus,
    poly,
    scaled,
    simplify,
)  # fmt: skip
from attncc.ir.build import ONE, ZERO, add, floordiv, maximum, minimum, mul, sub
from attncc.ir.expr import Const, Expr, Op, Size, mentions
from attncc.passes.bounds.predicates import Clause, inequality


@dataclass(frozen=True)
class RowStripe:
    """Keys in [low, high] up to multiples of `step`; both ends may depend on the row."""

    step: Expr
    low: Expr
    high: Expr


@dataclass(frozen=True)
class RowSet:
    """Keys max(lo) <= j < min(hi), inside all `stripes`, for rows max(first) <= i < min(end) where every `when` (over
    neither index) and every `guard` (over the row alone) holds. `exact`: no atom was dropped, so these are the keys of
    the clause."""

    first: tuple[Expr, ...]
    end: tuple[Expr, ...]
    when: tuple[Expr, ...]
    guard: tuple[Expr, ...]
    lo: tuple[Expr, ...]
    hi: tuple[Expr, ...]
    stripes: tuple[RowStripe, ...]
    exact: bool


@dataclass(frozen=True)
class Solved:
    """index >= bound, or index < bound."""

    is_lower: bool
    bound: Expr


def solve(x: Expr, index: Expr, extents: Extents) -> Solved | None:
    """`0 <= x` solved for `index`, or None where it is not of a form that has one bound."""
    split = _one_factor(poly(x), index)
    if split is None:
        return None
    factor, a, rest = split
    ones = at_least_one(extents, x)
    if never_negative(plus(a, {(): -1}), ones):
        bound = sub(ZERO, floordiv(rest, expr(a)))  # factor >= bound
        if factor is index:
            return Solved(True, simplify(bound, extents))
        inner = _numerator(factor, extents)
        return None if inner is None else solve(sub(inner[0], mul(bound, inner[1])), index, extents)
    down = {m: -c for m, c in a.items()}
    if never_negative(plus(down, {(): -1}), ones):
        above = add(floordiv(rest, expr(down)), ONE)  # factor < above
        if factor is index:
            return Solved(False, simplify(above, extents))
        inner = _numerator(factor, extents)
        return None if inner is None else solve(sub(sub(mul(above, inner[1]), ONE), inner[0]), index, extents)
    return None


def _one_factor(p: Poly, index: Expr) -> tuple[Expr, Poly, Expr] | None:
    """(factor, a, rest) with p = a * factor + rest, `a` over sizes alone, `rest` without the index."""
    a: Poly = {}
    rest: Poly = {}
    factor: Expr | None = None
    for m, c in p.items():
        holding = [f for f in m if mentions(f, index)]
        if not holding:
            rest[m] = c
            continue
        if len(holding) > 1 or (factor is not None and holding[0] is not factor):
            return None
        factor = holding[0]
        others = list(m)
        others.remove(factor)
        if not all(isinstance(f, Size) for f in others):
            return None
        a[tuple(others)] = c
    return None if factor is None else (factor, a, expr(rest))


def _numerator(x: Expr, extents: Extents) -> tuple[Expr, Expr] | None:
    """(n, c) for x = n // c with c >= 1."""
    if isinstance(x, Op) and x.name in ("floordiv", "truncdiv"):
        n, c = x.args
        if is_positive(poly(c)) and (x.name == "floordiv" or nonnegative(n, extents)):
            return n, c
    return None


def row_set(clause: Clause, i: Expr, j: Expr, extents: Extents) -> RowSet:
    first: list[Expr] = []
    end: list[Expr] = []
    when: list[Expr] = []
    guard: list[Expr] = []
    lo: list[Expr] = []
    hi: list[Expr] = []
    wrapped: dict[Expr, list[Expr]] = {}
    exact = True
    for atom in sorted(clause, key=repr):
        x = inequality(atom)
        if not mentions(atom, j):
            solved = solve(x, i, extents) if x is not None else None
            if not mentions(atom, i):
                when.append(atom)
            elif solved is not None:
                (first if solved.is_lower else end).append(solved.bound)
            else:
                guard.append(atom)
            continue
        alone = x is not None and _one_factor(poly(x), j) is not None
        exact = exact and alone
        for n in () if x is None else (x,) if alone else relaxations(x, j, extents):
            solved = solve(n, j, extents)
            split = _one_factor(poly(n), j)
            if solved is not None:
                (lo if solved.is_lower else hi).append(solved.bound)
            elif split is not None and _is_mod(split[0]):
                wrapped.setdefault(split[0], []).append(n)
            else:
                exact = False
    stripes = [_stripes(m, xs, j, extents) for m, xs in wrapped.items()]
    known = sorted((s for found in stripes for s in found), key=_period, reverse=True)
    exact = exact and all(stripes)
    return RowSet(tuple(first), tuple(end), tuple(when), tuple(guard), tuple(lo), tuple(hi), tuple(known), exact)


def relaxations(x: Expr, index: Expr, extents: Extents) -> list[Expr]:
    """What `0 <= x` implies for each factor that depends on the index, the others at the end that allows most: for keys
    in tile order, j // 64 * 8 + j % 64 // 8 >= n implies j // 64 * 8 + 7 >= n."""
    terms = poly(x)
    moving = {f for m in terms for f in m if mentions(f, index)}
    result: list[Expr] = []
    for kept in sorted(moving, key=repr):
        total: Poly = {}
        for m, c in terms.items():
            others = [f for f in m if f in moving and f is not kept]
            if not others:
                total = plus(total, {m: c})
                continue
            low, high = ends_of(others[0], extents)
            end = high if c > 0 else low
            sizes = [f for f in m if f is not others[0]]
            if end is None or not all(isinstance(f, Size) for f in sizes):
                break
            total = plus(total, poly(mul(expr(scaled(end, c)), _product(sizes))))
        else:
            result.append(expr(total))
    return result


def _product(xs: list[Expr]) -> Expr:
    result: Expr = ONE
    for x in xs:
        result = mul(result, x)
    return result


def _period(stripe: RowStripe) -> int:
    return int(stripe.step.value) if isinstance(stripe.step, Const) else 0


def _is_mod(x: Expr) -> bool:
    return isinstance(x, Op) and x.name == "mod" and is_positive(poly(x.args[1]))


def _stripes(m: Expr, atoms: list[Expr], j: Expr, extents: Extents) -> tuple[RowStripe, ...]:
    """The stripes of the inequalities on m = x % c, where x is j or (j + a) // b, or minus those, plus a rest.

    The first keeps to one period, as m does. Where its ends are cut for that, a second is left uncut: it may wrap, but
    over the rows of a tile its ends move together."""
    assert isinstance(m, Op)
    last = sub(m.args[1], ONE)
    lows: list[Expr] = []
    highs: list[Expr] = []
    for atom in atoms:
        solved = solve(atom, m, extents)
        if solved is None:
            return ()
        (lows if solved.is_lower else highs).append(solved.bound if solved.is_lower else sub(solved.bound, ONE))
    cut = _joined(maximum, [x for x in lows if not nonnegative(sub(ZERO, x), extents)], ZERO, extents)
    top = _joined(minimum, [x for x in highs if not nonnegative(sub(x, last), extents)], last, extents)
    kept = _of_keys(m, cut, top, j, extents)
    if kept is None or not lows or not highs:
        return () if kept is None else (kept,)
    free = _of_keys(m, _joined(maximum, lows[1:], lows[0], {}), _joined(minimum, highs[1:], highs[0], {}), j, extents)
    return (kept,) if free is None or free == kept else (kept, free)


def _joined(join: Callable[[Expr, Expr], Expr], xs: list[Expr], end: Expr, extents: Extents) -> Expr:
    for x in xs:
        end = join(end, x)
    return simplify(end, extents) if extents else end


def _of_keys(m: Op, low: Expr, high: Expr, j: Expr, extents: Extents) -> RowStripe | None:
    """Keys with m in [low, high]."""
    factor, period = m.args
    while True:  # factor in [low, high] up to multiples of period, unwrapped down to the key
        split = _one_factor(poly(factor), j)
        if split is None or split[1] not in ({(): 1}, {(): -1}):
            return None
        if split[1] == {(): 1}:
            low, high = sub(low, split[2]), sub(high, split[2])
        else:
            low, high = sub(split[2], high), sub(split[2], low)
        if split[0] is j:
            return RowStripe(*(simplify(n, extents) for n in (period, low, high)))
        inner = _numerator(split[0], extents)
        if inner is None:
            return None
        factor, by = inner
        period, low, high = mul(period, by), mul(low, by), sub(mul(add(high, ONE), by), ONE)
