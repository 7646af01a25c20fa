"""Scores with masks in them, taken apart: the softmax of what is left, where it is visible, is that of the whole."""

from __future__ import annotations

import math
from random import Random

import pytest
import torch

from attncc.ir.attention import S
from attncc.ir.build import add, and_, const, eq, ge, lt, maximum, mod, mul, not_, op, sub, where
from attncc.ir.evaluate import Evaluator
from attncc.ir.expr import Expr, Index
from attncc.patterns.site.masks import hidden_by, hides_by_score, split_mask, visible_where

ROWS, KEYS = 7, 9
ROW, KEY = Index("i"), Index("j")
LOWEST = float(torch.finfo(torch.float32).min)


def held(x: Expr, scores: torch.Tensor) -> torch.Tensor:
    grid: dict[Expr, torch.Tensor] = {ROW: torch.arange(ROWS)[:, None], KEY: torch.arange(KEYS), S: scores}
    return Evaluator(grid, {}, scores.dtype)(x).expand(ROWS, KEYS)


def condition(random: Random) -> Expr:
    window = and_(ge(ROW, KEY), lt(sub(ROW, KEY), const(3)))
    stripes = not_(eq(mod(add(ROW, KEY), const(3)), const(0)))
    return random.choice((ge(ROW, KEY), lt(KEY, const(4)), lt(ROW, const(3)), window, stripes, const(True)))


def masked(random: Random, fills: tuple[float, ...]) -> Expr:
    """A score under one to three masks, put in its place or added to it."""
    x: Expr = mul(S, const(0.5))
    for _ in range(random.randrange(1, 4)):
        fill, c = const(random.choice(fills)), condition(random)
        kind = random.randrange(4)
        if kind == 0:
            x = where(c, x, fill)
        elif kind == 1:
            x = where(not_(c), fill, x)
        elif kind == 2:
            x = add(x, where(c, const(0.0), fill))
        else:
            x = add(x, const(0.25))
    return x


@pytest.mark.parametrize("fills", [(-math.inf,), (-1e9,), (-1e30,), (LOWEST,), (-math.inf, LOWEST), (-100.0,),
                                   (-1e30, LOWEST), (-100.0, -math.inf), (-1e9, -1e30)], ids=str)  # fmt: skip
def test_the_softmax_is_the_same(fills: tuple[float, ...]) -> None:
    random, by, taken = Random(str(fills)), torch.Generator().manual_seed(0), 0
    for _ in range(25):
        x = masked(random, fills)
        scores = torch.randn(ROWS, KEYS, generator=by)
        found = split_mask(x, half=False, infinite_empty="nan")
        visible, bare = held(found.mask, scores), held(found.score, scores)
        taken += not bool(visible.all())
        want = held(x, scores).softmax(-1)
        got = bare.masked_fill(~visible, -math.inf).softmax(-1)
        empty = ~visible.any(-1, keepdim=True)
        if found.empty == "mean":
            got = torch.where(empty, torch.full_like(got, 1.0 / KEYS), got)
        elif found.empty == "zero":
            assert not bool(empty.any())
        torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-5, atol=1e-6)
        if found.floor is not None:
            assert bool((held(x, scores)[empty.expand_as(want)] == found.floor).all())
    assert taken > 3 or fills == (-100.0,)


def test_what_is_mild_stays_a_bias() -> None:
    for fill in (-100.0, -1e4):
        x = add(S, where(ge(ROW, KEY), const(0.0), const(fill)))
        assert split_mask(x, half=False, infinite_empty="nan").score is x


def test_the_lowest_number_of_float16_is_a_fill_of_float16_alone() -> None:
    x = where(ge(ROW, KEY), S, const(-65504.0))
    assert split_mask(x, half=True, infinite_empty="nan").score is S
    assert split_mask(x, half=False, infinite_empty="nan").score is x


@pytest.mark.parametrize(("fill", "empty"), [(-1.7976931348623157e308, "mean"), (-math.inf, "nan"), (LOWEST, "mean")])
def test_rows_that_see_nothing(fill: float, empty: str) -> None:
    assert split_mask(where(ge(ROW, KEY), S, const(fill)), half=False, infinite_empty="nan").empty == empty


def test_fills_that_add_up_to_infinity() -> None:
    """Rows of the lowest number twice are NaN in float32."""
    x = add(add(S, where(ge(ROW, KEY), const(0.0), const(LOWEST))), where(ge(ROW, KEY), const(0.0), const(LOWEST)))
    assert split_mask(x, half=False, infinite_empty="nan").empty == "nan"


def test_a_choice_by_the_score_is_no_mask() -> None:
    x = where(ge(S, const(0.5)), S, const(-math.inf))
    assert hides_by_score(x) and split_mask(x, half=False, infinite_empty="nan").score is x
    assert not hides_by_score(where(ge(ROW, KEY), S, const(-math.inf)))


def test_scores_that_are_hidden_in_any_case() -> None:
    low = const(-math.inf)
    assert hidden_by(add(low, S), half=False) == -math.inf
    assert hidden_by(where(ge(ROW, KEY), const(-1e9), low), half=False) == -1e9
    assert hidden_by(mul(low, const(2.0)), half=False) == -math.inf
    assert hidden_by(where(ge(ROW, KEY), S, low), half=False) is None
    assert hidden_by(op("bf16", low), half=False) == -math.inf


def test_where_a_score_is_visible() -> None:
    assert visible_where(where(ge(ROW, KEY), S, const(-1e9)), -1e9, half=False) is ge(ROW, KEY)
    assert visible_where(add(where(ge(ROW, KEY), S, const(-1e9)), const(-1e9)), -1e9, half=False) is None
    raised = maximum(where(ge(ROW, KEY), S, const(-math.inf)), const(-1e9))
    assert visible_where(raised, -1e9, half=False) is ge(ROW, KEY)
