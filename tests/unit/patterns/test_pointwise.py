"""Each row of the table of pointwise operators: what the reader says an element is, held against eager."""

from __future__ import annotations

from random import Random

import pytest
from reading.asked import mistakes
from reading.pointwise import samples
from torch._ops import OpOverload

from attncc.patterns.reader.pointwise import ELEMENTS

ROWS = [pytest.param(target, id=str(target).removeprefix("aten.")) for target in ELEMENTS]


def check(target: OpOverload, count: int, seed: int) -> None:
    found = samples(target, count, seed)
    assert len(found) == count, "torch accepts too few random calls: see support/reading/pointwise.py"
    wrong, read = mistakes(found, Random(seed))
    assert not wrong, "\n".join(wrong)
    assert read, "no call was read by the rule"


@pytest.mark.parametrize("target", ROWS)
def test_value_is_eager(target: OpOverload) -> None:
    check(target, count=4, seed=0)


@pytest.mark.full
@pytest.mark.parametrize("target", ROWS)
def test_many_values_are_eager(target: OpOverload) -> None:
    check(target, count=30, seed=1)
