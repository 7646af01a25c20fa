"""Random attention programs, compiled and not: what is lifted gives what the program gives, and nothing is left unsaid.

Most programs run with the interpreter as their kernel, so that what differs is the lifter's fault; some run with real
kernels, and some through Dynamo, with a second call of other sizes where sizes are symbols.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from random_models.check import check, check_gradients, through_dynamo, through_trace
from random_models.writer import Program, Writer


def _settings(count: int) -> settings:
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(
        max_examples=count, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=slow,
    )  # fmt: skip


@st.composite
def programs(draw: st.DrawFn) -> Program:
    return Writer(lambda *options: draw(st.sampled_from(options))).write()


def _seeded(seed: int) -> Program:
    return Writer(_chooser(seed)).write()


def _chooser(seed: int):
    choose = random.Random(seed)
    return lambda *options: choose.choice(options)


@_settings(36)
@given(programs(), st.integers(0, 2**16))
def test_a_lifted_program_gives_what_the_program_gives(p: Program, seed: int) -> None:
    check(p, seed, door=through_trace)


@_settings(8)
@given(programs(), st.integers(0, 2**16))
def test_through_dynamo_too(p: Program, seed: int) -> None:
    check(p, seed, door=through_dynamo)


@pytest.mark.parametrize("first", [0, 5])
def test_with_real_kernels_too(first: int) -> None:
    for seed in range(first, first + 3):
        check(_seeded(seed), seed, "real", door=through_trace)


def test_gradients_too() -> None:
    assert sum(check_gradients(_seeded(seed), seed) for seed in range(8)) >= 3


def test_what_is_plain_attention_is_fused() -> None:
    """The programs that nothing stands in the way of are the greater part of those drawn, and nearly all are fused."""
    plain = [(seed, p) for seed in range(36) if (p := _seeded(seed)).plain and p.sizes.m > 1]
    status = Counter(s.status for seed, p in plain for s in check(p, seed, door=through_trace))
    assert status["fused"] >= 0.9 * sum(status.values()), status


@pytest.mark.parametrize("seed", [
    20334,  # what is -inf before heads are mixed with both signs is nan
    50108,  # numbers too large for float16 are infinite where they are chosen
    50786,  # a tensor that is read for some rows only hides keys from those
    52115,  # bounds that read data, in stripes of what is hidden
    3487,  # weights that are summed, all of them to one number
    60690,  # scores that are written to in part before heads are mixed
    200040,  # exponentials that are overwritten in part, of scores whose bias changes, divided late
    54391,  # keys that are overwritten after the squared distances to them
])  # fmt: skip
def test_what_once_went_wrong(seed: int) -> None:
    check(_seeded(seed), seed, door=through_trace)


def test_a_row_of_fills_less_its_maximum_once_went_wrong() -> None:
    check(_seeded(90988), 90988, door=through_dynamo)


@pytest.mark.full
@pytest.mark.parametrize("first", range(2000, 4000, 50))
def test_thousands(first: int) -> None:
    for seed in range(first, first + 50):
        check(_seeded(seed), seed, door=through_trace)


@pytest.mark.full
@pytest.mark.parametrize("first", range(6000, 6400, 10))
def test_hundreds_through_dynamo_with_real_kernels(first: int) -> None:
    for seed in range(first, first + 10):
        check(_seeded(seed), seed, "real", door=through_dynamo)
