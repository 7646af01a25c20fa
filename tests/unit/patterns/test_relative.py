"""Biases by distance as tables: each operation of a formula, made in the graph, gives the formula's values."""

from __future__ import annotations

from random import Random

import pytest
import torch
from reading.asked import Asked, lines

from attncc.ir.build import add, cast, const, floordiv, le, lt, maximum, minimum, mul, op, sub, where
from attncc.ir.evaluate import Evaluator
from attncc.ir.expr import Expr, Index, Load
from attncc.patterns.reader.relative import _DIVISIONS, _NAMED, by_distance

HEADS, ROWS, KEYS, WIDTH = 2, 5, 7, 12
H, ROW, KEY = Index("h"), Index("i"), Index("j")
EXTENTS: dict[Expr, Expr] = {H: const(HEADS), ROW: const(ROWS), KEY: const(KEYS)}


def graph(*, symbolic: bool = False) -> Asked:
    """A bias (heads, rows, keys) out of a table (heads, width); inputs tell the numbers of rows and keys."""

    def call(table: torch.Tensor, rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return table[:, :1, None].expand(-1, rows.shape[0], keys.shape[0]).clone()

    return Asked(call, torch.randn(HEADS, WIDTH), torch.randn(ROWS), torch.randn(KEYS), symbolic=symbolic)


def place(x: Expr) -> Expr:
    """An integer as an index into the table."""
    return minimum(maximum(x, const(0)), const(WIDTH - 1))


def formula(name: str, load: str, random: Random) -> Expr:
    """Something of a table and of the distance of two indices that holds an operation."""
    distance = sub(KEY, ROW)
    bias = Load(load, (H, place(add(distance, const(random.randrange(8))))), "float")
    near, number = lt(distance, const(2)), op("float", distance)
    if name in ("floordiv", "mod", "truncdiv"):
        return Load(load, (H, place(op(name, add(distance, const(random.randrange(9))), const(3)))), "float")
    if name in ("lt", "le", "eq", "ne"):
        return where(op(name, distance, const(1)), bias, const(0.5))
    if name in ("and", "or"):
        return where(op(name, near, le(const(-2), distance)), bias, const(0.5))
    if name == "not":
        return where(op("not", near), bias, const(-1.0))
    if name == "where":
        return where(near, bias, number)
    if name in ("neg", "abs"):
        return add(op(name, bias), op("float", op(name, distance)))
    if name in ("log", "log1p", "sqrt", "rsqrt"):
        return add(bias, op(name, add(op("abs", number), const(1.0))))
    if name == "isnan":
        return add(bias, op("where", op("isnan", number), const(1.0), number))
    if name == "pow":
        return mul(bias, op("pow", add(op("abs", number), const(1.0)), const(0.5)))
    if name in ("add", "sub", "mul", "div", "min", "max"):
        return op(name, bias, add(number, const(20.0)))
    return add(bias, op(name, mul(number, const(0.3))))


@pytest.mark.parametrize("name", [*_NAMED, *_DIVISIONS])
def test_a_table_holds_what_the_formula_gives(name: str) -> None:
    of = graph()
    (n,) = of.results
    value = formula(name, of.facts.nodes[0].name, Random(name))
    table = by_distance(of.facts, n, value, (H, ROW, KEY), frozenset({ROW, KEY}), EXTENTS)
    assert table is not None
    held = of.held()
    assert tuple(held[table.tensor].shape) == (HEADS, ROWS + KEYS - 1)
    evaluator = Evaluator(lines({H: HEADS, ROW: ROWS, KEY: KEYS}), held, torch.float32, checked=True)
    torch.testing.assert_close(evaluator(table), evaluator(value).expand(HEADS, ROWS, KEYS))


def test_sizes_that_are_symbols_are_read_from_the_inputs() -> None:
    of = graph(symbolic=True)
    (n,) = of.results
    at, extents = of.plain(n)
    h, row, key = at
    value = Load(of.facts.nodes[0].name, (h, place(add(sub(key, row), const(3)))), "float")
    table = by_distance(of.facts, n, value, at, frozenset({row, key}), extents)
    assert table is not None
    held = of.held()
    assert tuple(held[table.tensor].shape) == (HEADS, ROWS + KEYS - 1)


def test_what_depends_on_more_than_the_distance_is_no_table() -> None:
    of = graph()
    (n,) = of.results
    bias = Load(of.facts.nodes[0].name, (H, place(floordiv(add(ROW, KEY), const(2)))), "float")
    assert by_distance(of.facts, n, bias, (H, ROW, KEY), frozenset({ROW, KEY}), EXTENTS) is None
    without = cast(sub(KEY, ROW), "float")
    assert by_distance(of.facts, n, without, (H, ROW, KEY), frozenset({ROW, KEY}), EXTENTS) is None
