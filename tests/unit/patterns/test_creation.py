"""Each row of the table of operators that create, pick and join: what the reader says an element is, against eager."""

from __future__ import annotations

from random import Random

import pytest
import torch
from reading.asked import Asked, mistakes
from reading.creation import SYMBOLIC, samples
from torch._ops import OpOverload

from attncc.patterns.reader.creation import SOURCES

ROWS = [pytest.param(target, id=str(target).removeprefix("aten.")) for target in SOURCES]


def check(target: OpOverload, count: int, seed: int) -> None:
    found = samples(target, count, seed)
    assert len(found) == count, "too few calls that torch accepts: give them in support/reading/creation.py"
    wrong, read = mistakes(found, Random(seed))
    assert not wrong, "\n".join(wrong)
    assert read, "no call was read by the rule"


@pytest.mark.parametrize("target", ROWS)
def test_value_is_eager(target: OpOverload) -> None:
    check(target, count=8, seed=0)


@pytest.mark.full
@pytest.mark.parametrize("target", ROWS)
def test_many_values_are_eager(target: OpOverload) -> None:
    check(target, count=100, seed=1)


@pytest.mark.parametrize("target", ROWS)
def test_value_is_eager_for_symbolic_sizes(target: OpOverload) -> None:
    by = torch.Generator().manual_seed(0)
    of = Asked(
        SYMBOLIC[target], torch.randn(3, 6, generator=by), torch.randint(3, (3, 6), generator=by), symbolic=True
    )
    (n,) = of.results
    assert any(x.target is target for x in of.facts.nodes)
    for assuming in (False, True):
        answer = of.answer(n, *of.plain(n), assuming=assuming)
        assert answer.right, f"{answer.value} is {answer.got.tolist()}, not {answer.want.tolist()}"
        assert not answer.loaded, "it was not read by the rule"
