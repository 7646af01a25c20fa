"""Each row of the tables of operators that only move values: what the reader says an element is, held against eager."""

from __future__ import annotations

from random import Random

import pytest
import torch
from reading.asked import Asked, mistakes
from reading.view_ops import SYMBOLIC, samples
from torch._ops import OpOverload

from attncc.patterns.reader.view_ops import _GRIDS, _PARTS, VIEW_OPS

TARGETS = sorted({*VIEW_OPS, *_PARTS, *_GRIDS}, key=str)
ROWS = [pytest.param(target, id=str(target).removeprefix("aten.")) for target in TARGETS]


def check(target: OpOverload, count: int, seed: int) -> None:
    torch.manual_seed(seed)
    found = samples(target, count, seed)
    assert len(found) == count, "too few calls that torch accepts: give them in support/reading/view_ops.py"
    wrong, read = mistakes(found, Random(seed))
    assert not wrong, "\n".join(wrong)
    assert read, "no call was read by the rule"


@pytest.mark.parametrize("target", ROWS)
def test_value_is_eager(target: OpOverload) -> None:
    check(target, count=6, seed=0)


@pytest.mark.full
@pytest.mark.parametrize("target", ROWS)
def test_many_values_are_eager(target: OpOverload) -> None:
    check(target, count=100, seed=1)


def test_a_constant_is_read_where_it_is_a_number() -> None:
    of = Asked(lambda x: (x + torch.tensor(3.0), x * torch.tensor([1.0, 2.0])), torch.randn(2))
    for n, by in zip(of.results, ("x_1[x0] + 3.0", "x_1[x0] * detach__1[x0]"), strict=True):
        answer = of.answer(n, *of.plain(n))
        assert answer.right and repr(answer.value) == by


@pytest.mark.parametrize("target", [row for row in ROWS if row.values[0] is not torch.ops.aten.lift_fresh.default])
def test_value_is_eager_for_symbolic_sizes(target: OpOverload) -> None:
    of = Asked(SYMBOLIC[target], torch.randn(3, 6, 5), symbolic=True)
    (n,) = of.results
    assert any(x.target is target for x in of.facts.nodes)
    for assuming in (False, True):
        answer = of.answer(n, *of.plain(n), assuming=assuming)
        assert answer.right, f"{answer.value} is {answer.got.tolist()}, not {answer.want.tolist()}"
        assert not answer.loaded, "it was not read by the rule"
