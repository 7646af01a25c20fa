"""Choosing forms: the ladder against a solver of integer programs, the certificate against its definition."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
import torch
from scipy.optimize import Bounds, LinearConstraint, milp

from attncc.errors import PlanError
from attncc.plans.certificate import accepts, chance, needed
from attncc.plans.choice import Options, ladder, nearest
from attncc.plans.losses import Asked, parse_budget
from attncc.plans.plan import Key
from attncc.plans.stages import expected_most


def problem(seed: int, sites: int = 3, forms: int = 4, heads: int = 3) -> dict[Key, Options]:
    g = torch.Generator().manual_seed(seed)
    found: dict[Key, Options] = {}
    for s in range(sites):
        cost = torch.rand(forms, generator=g, dtype=torch.float64) * 9
        cost[0] = 10
        error = (0.02 + torch.rand(forms, heads, generator=g, dtype=torch.float64) ** 3) / cost[:, None]
        error[0] = 0
        found[f"layers.{s}", 0, "prefill"] = Options(cost, error)
    return found


def least_cost(table: dict[Key, Options], theta: float, most: int) -> float:
    """The exact optimum: x[s, r, h] says that head h of site s takes form r, y[s, r] that any does."""
    costs: list[float] = []
    errors: list[float] = []
    for o in table.values():
        forms, heads = o.error.shape
        costs += (o.cost / heads).repeat_interleave(heads).tolist() + [0.0] * forms
        errors += o.error.flatten().tolist() + [0.0] * forms
    rows: list[np.ndarray] = []
    low: list[float] = []
    high: list[float] = []
    start = 0
    for o in table.values():
        forms, heads = o.error.shape
        for h in range(heads):
            row = np.zeros(len(costs))
            row[[start + r * heads + h for r in range(forms)]] = 1
            rows.append(row)
            low, high = [*low, 1], [*high, 1]
        for r, h in product(range(forms), range(heads)):
            row = np.zeros(len(costs))
            row[start + r * heads + h], row[start + forms * heads + r] = 1, -1
            rows.append(row)
            low, high = [*low, -np.inf], [*high, 0]
        row = np.zeros(len(costs))
        row[start + forms * heads : start + forms * heads + forms] = 1
        rows.append(row)
        low, high = [*low, -np.inf], [*high, most]
        start += forms * heads + forms
    rows.append(np.array(errors))
    low, high = [*low, -np.inf], [*high, theta]
    found = milp(
        np.array(costs), constraints=LinearConstraint(np.array(rows), low, high), integrality=np.ones(len(costs)),
        bounds=Bounds(0, 1),
    )  # fmt: skip
    assert found.success, found.message
    return float(found.fun)


@pytest.mark.parametrize("most", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_each_plan_of_the_ladder_is_the_best_for_its_own_error(seed: int, most: int) -> None:
    table = problem(seed)
    rungs = ladder(table, most)
    assert rungs[0].error == 0 and rungs[0].cost == pytest.approx(30)
    assert all(a.error < b.error and a.cost > b.cost for a, b in pairwise(rungs))
    assert len(rungs) > 3
    for rung in rungs:
        assert rung.cost == pytest.approx(least_cost(table, rung.error * (1 + 1e-9) + 1e-12, most), rel=1e-6)
        for forms in rung.forms.values():
            assert len({*forms}) <= most


@pytest.mark.parametrize("seed", range(4))
def test_between_two_plans_nothing_much_better_exists(seed: int) -> None:
    """The relaxation's gap: a budget between two rungs gets the cheaper rung's cost at best."""
    table = problem(seed)
    rungs = ladder(table)
    for a, b in pairwise(rungs):
        theta = (a.error + b.error) / 2
        assert nearest(rungs, theta) == rungs.index(a)
        assert b.cost - 1e-9 <= least_cost(table, theta, 2) <= a.cost + 1e-9


def test_forms_that_are_no_faster_or_mean_nothing_are_no_candidates() -> None:
    cost = torch.tensor([10.0, 9.9, float("nan"), 2.0])
    error = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [float("nan"), float("nan")]])
    (rung,) = ladder({("a", 0, "prefill"): Options(cost, error)})
    assert rung.forms == {("a", 0, "prefill"): (0, 0)} and rung.cost == 10


def test_how_much_data_a_certificate_needs() -> None:
    assert [[needed(a, 0.05, f) for f in range(3)] for a in (0.10, 0.05, 0.02)] == [
        [29, 46, 61], [59, 93, 124], [149, 236, 313],
    ]  # fmt: skip
    assert chance(3, 1, 0.5) == pytest.approx(0.5)
    assert accepts(59, 0, 0.05, 0.05) and not accepts(58, 0, 0.05, 0.05) and not accepts(59, 1, 0.05, 0.05)


def test_a_certificate_is_false_as_seldom_as_it_claims() -> None:
    """A plan whose true rate of failures is just above alpha passes at most in a share delta of draws."""
    g = torch.Generator().manual_seed(0)
    alpha, delta, n = 0.05, 0.05, 93
    failures = (torch.rand(20_000, n, generator=g) < alpha).sum(1)
    passed = sum(accepts(n, int(f), alpha, delta) for f in failures.unique() for _ in range(int((failures == f).sum())))
    assert passed / 20_000 <= delta * 1.1


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("kl<=0.02@95%", Asked("kl", 0.02, 0.95)),
        (" flips <= 1e-2 ", Asked("flips", 0.01, 0.95)),
        ("rel<=0.1@99.5%", Asked("rel", 0.1, 0.995)),
    ],
)
def test_budgets(text: str, asked: Asked) -> None:
    found = parse_budget(text)
    assert (found.metric, found.limit) == (asked.metric, asked.limit)
    assert found.share == pytest.approx(asked.share)


@pytest.mark.parametrize("text", ["", "kl", "kl<0.1", "kl<=x", "kl<=0.1@100%", "kl<=0@95%", "kl<=-1", "kl<=nan"])
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(PlanError, match="the budget"):
        parse_budget(text)


def test_a_plan_is_chosen_by_how_far_losses_spread() -> None:
    """Not by the largest of a few samples: of losses that spread by a factor of 2, few samples show the tail."""
    g = torch.Generator().manual_seed(0)
    kept: list[float] = []
    for _ in range(200):
        losses = {n: (torch.randn(4, generator=g) * 0.7 + n).exp().tolist() for n in range(5)}
        most = expected_most(losses, 0.9)
        assert all(most[n] >= max(losses[n]) for n in losses)
        unseen = (torch.randn(400, generator=g) * 0.7 + 2).exp()
        kept.append((unseen <= most[2]).float().mean().item())
    assert sum(share >= 0.9 for share in kept) > 120
    assert expected_most({0: [0.0], 1: [0.5]}, 0.9) == pytest.approx({0: 1e-9, 1: 0.5})
