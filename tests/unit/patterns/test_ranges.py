"""Integers of few bits: what is said to fit does, for every number that the tensors may hold."""

from __future__ import annotations

from itertools import product
from random import Random

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from attncc.ir.build import cast, const, eq, lt, mod, op, where
from attncc.ir.evaluate import Evaluator
from attncc.ir.expr import Expr, Index, Load
from attncc.patterns.graph.facts import Facts
from attncc.patterns.reader.ranges import fits

ROW = Index("i")
EXTENTS: dict[Expr, Expr] = {ROW: const(1 << 20)}
NARROW = (torch.uint8, torch.int8, torch.int16, torch.int32)
VALUES = {torch.uint8: (0, 1, 2, 127, 128, 255), torch.int8: (-128, -1, 0, 1, 127)}


def graph(dtype: torch.dtype) -> Facts:
    x = torch.zeros(3, dtype=dtype)
    return Facts(make_fx(lambda a, b: a + b, tracing_mode="fake", pre_dispatch=True)(x, x).graph)


def expression(random: Random, leaves: tuple[Expr, ...], depth: int) -> Expr:
    if depth == 0:
        return random.choice((*leaves, const(random.randrange(-3, 4)), const(random.choice((100, 255)))))
    a, b = (expression(random, leaves, depth - 1) for _ in range(2))
    kind = random.randrange(5)
    if kind == 0:
        return where(lt(a, b), a, b)
    if kind == 1:
        return mod(a, const(random.choice((2, 7, 300))))
    if kind == 2:
        return cast(eq(a, b), "int")
    if kind == 3:
        return op(random.choice(("neg", "abs")), a)
    return op(random.choice(("add", "sub", "mul", "min", "max")), a, b)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_what_fits_never_wraps_round(dtype: torch.dtype) -> None:
    facts, told, random = graph(dtype), 0, Random(0)
    names = [n.name for n in facts.nodes if n.op == "placeholder"]
    leaves = tuple(Load(name, (ROW,), "int") for name in names)
    rows = torch.tensor(list(product(VALUES[dtype], repeat=2))).T
    tensors = dict(zip(names, rows, strict=True))
    grid: dict[Expr, torch.Tensor] = {ROW: torch.arange(rows.shape[1])}
    for _ in range(300):
        x = expression(random, leaves, random.choice((1, 2)))
        held = torch.iinfo(dtype)
        if fits(facts, x, dtype, EXTENTS):
            told += 1
            value = Evaluator(grid, tensors, torch.float64)(x)
            assert held.min <= int(value.min()) and int(value.max()) <= held.max, x
    assert told > 30


def test_wide_tensors_may_hold_anything() -> None:
    facts = graph(torch.int64)
    name = next(n.name for n in facts.nodes if n.op == "placeholder")
    assert all(not fits(facts, Load(name, (ROW,), "int"), dtype, EXTENTS) for dtype in NARROW)


def test_a_mask_of_few_bits_is_read() -> None:
    """One minus a mask of bytes stays what it is, an unknown byte's does not."""
    facts = graph(torch.uint8)
    name = next(n.name for n in facts.nodes if n.op == "placeholder")
    mask, byte = cast(lt(ROW, const(2)), "int"), Load(name, (ROW,), "int")
    assert fits(facts, op("sub", const(1), mask), torch.uint8, EXTENTS)
    assert not fits(facts, op("sub", const(1), byte), torch.uint8, EXTENTS)
