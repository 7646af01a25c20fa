"""Plans that are made by hand, and costs that a noisy machine has no say in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

from attncc.driver.planning import fingerprint
from attncc.plans import costs
from attncc.plans.plan import SCHEMA, Budget, Certificate, Plan, Rule, SitePlan
from attncc.plans.tapping import Seen

WHAT = "2 heads of 32 and 33, f32: softmax(s) v"


FORM = "streaming{sinks=16,window=64}"


def site(path: str = "blocks.0", heads: tuple[int, ...] = (0,)) -> SitePlan:
    rules = (Rule(FORM, heads, 0.3, 1e-4),) if heads else ()
    return SitePlan(path, 0, "prefill", WHAT, 2, (64, 512), rules, 10.0, 6.5)


def plan(model: nn.Module, *sites: SitePlan, lengths: tuple[int, int] = (64, 512)) -> Plan:
    weights = tuple(dict.fromkeys(map(fingerprint, model.parameters())))
    return Plan(
        SCHEMA, {"attncc": "0"}, "a machine", weights, sites or (site(),), Budget("kl", 0.02, 0.9),
        Certificate(29, 0, 0.05, 1, 1e-3, 2e-3, "data"), lengths, 1.0, 1e-4, ((0.0, 10.0), (1e-4, 6.5)), 0,
    )  # fmt: skip


def costs_by_density(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, float]]:
    """A form costs 10 milliseconds for all visible keys, and no machine is asked."""

    def timed(seen: Seen, forms: dict[str, costs.Forms], known: object) -> dict[str, float]:
        found = {name: costs.density(seen, each) if name else 1.0 for name, each in forms.items()}
        return {name: 10.0 * share for name, share in found.items() if share == share}

    monkeypatch.setattr(costs, "timed", timed)
    return timed
