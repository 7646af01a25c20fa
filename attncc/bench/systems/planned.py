"""A plan by hand: every head of every attention of a model takes one form, for the lengths of one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from attncc.driver.planning import fingerprint, summary
from attncc.ir import Program
from attncc.passes.policies.places import head_count
from attncc.plans.plan import SCHEMA, Budget, Plan, Rule, SitePlan
from attncc.plans.tapping import Seen, tapped
from attncc.version import __version__


class _Unwatched:
    def form(self, seen: Seen) -> Program | None:
        return None

    def gave(self, seen: Seen, out: Tensor) -> None:
        return None

    def backward(self, seen: Seen, out: Tensor, gradient: Tensor) -> None:
        return None


def plan_of(model: nn.Module, inputs: Sequence[Tensor], form: str) -> Plan:
    """The model runs once, exact, to see its attentions. The plan has no certificate, as nothing was measured."""
    with tapped(_Unwatched()) as (planner, compiled), torch.no_grad():
        compiled(model)(*inputs)
    sites: list[SitePlan] = []
    for (path, place, _), site in planner.sites.items():
        heads, keys = head_count(site.attention), int(site.keys)
        rule = Rule(form, tuple(range(heads)), 1.0, 0.0)
        sites.append(SitePlan(path, place, site.phase, summary(site.attention), heads, (keys, keys), (rule,), 0.0, 0.0))
    lengths = [int(site.keys) for site in planner.sites.values()]
    weights = tuple(dict.fromkeys(map(fingerprint, model.parameters())))
    return Plan(
        SCHEMA, {"attncc": __version__}, "", weights, tuple(sites), Budget("kl", None, 0.95), None,
        (min(lengths, default=0), max(lengths, default=0)), 1.0, 0.0, (), 0,
    )  # fmt: skip
