"""Conditions on integers: what is said to be impossible is, and what an expression is simplified to equals it."""

from __future__ import annotations

import itertools
import random

import torch

from attncc.ir import Const, Expr, Index
from attncc.ir.build import ONE, add, and_, const, eq, floordiv, ge, lt, mod, mul, not_, op, or_, sub, where
from attncc.ir.evaluate import Evaluator
from attncc.patterns.reader.assumptions import Reach

AXES = {Index("a"): Const(4), Index("b"): Const(3), Index("t"): Const(7)}
EXTENTS: dict[Expr, Expr] = dict(AXES)
POINTS = list(itertools.product(range(4), range(3), range(7)))


def truth(x: Expr) -> list[int]:
    grid = dict(zip(EXTENTS, torch.tensor(POINTS).T, strict=True))
    return Evaluator(grid, {}, torch.float64)(x).expand(len(POINTS)).int().tolist()


def number(choose: random.Random) -> Expr:
    x: Expr = const(choose.randrange(-6, 7))
    for index in EXTENTS:
        x = add(x, mul(index, const(choose.randrange(-3, 4))))
    kind = choose.randrange(6)
    by = const(choose.choice([2, 3, 5, 8]))
    return [x, x, floordiv(x, by), mod(x, by), op("min", x, ONE), op("max", x, const(2))][kind]


def condition(choose: random.Random) -> Expr:
    a, b = number(choose), number(choose)
    x = choose.choice([lt, ge, eq])(a, b)
    kind = choose.randrange(4)
    return [x, not_(x), and_(x, lt(b, number(choose))), or_(x, ge(a, number(choose)))][kind]


def test_what_is_impossible_never_holds() -> None:
    choose, told = random.Random(0), 0
    reach = Reach(EXTENTS)
    for _ in range(300):
        context = tuple(condition(choose) for _ in range(choose.randrange(1, 4)))
        holds = [all(at) for at in zip(*(truth(c) for c in context), strict=True)]
        if not reach.possible(context):
            told += 1
            assert not any(holds), context
    assert told > 20


def test_simplified_expressions_are_equal_where_the_conditions_hold() -> None:
    choose, changed = random.Random(1), 0
    reach = Reach(EXTENTS)
    for _ in range(200):
        context = tuple(condition(choose) for _ in range(2))
        x = where(condition(choose), number(choose), where(condition(choose), number(choose), number(choose)))
        new = reach.simplified(x, context)
        changed += new is not x
        holds = [all(at) for at in zip(*(truth(c) for c in context), strict=True)]
        assert [v for v, h in zip(truth(new), holds, strict=True) if h] == [
            v for v, h in zip(truth(x), holds, strict=True) if h
        ], (x, context)
    assert changed > 50


def test_a_skew_is_a_shift() -> None:
    row, key = Index("a"), Index("t")
    reach = Reach({row: Const(4), key: Const(12)})
    place = mod(add(mul(row, const(13)), key), const(14))
    inside = lt(place, const(9))
    assert reach.simplified(place, (inside,)) is sub(key, row)
    assert reach.proves((inside,), ge(key, row))
    assert not reach.proves((), inside)


def test_a_skew_that_wraps_round_is_none() -> None:
    row, key = Index("a"), Index("t")
    reach = Reach({row: Const(4), key: Const(12)})
    inside = lt(mod(sub(key, row), const(11)), const(9))
    assert not reach.proves((inside,), ge(key, row))
