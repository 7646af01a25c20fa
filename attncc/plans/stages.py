"""The stages of profiling: what forms cost, what they do to the output, which plans there are, which the budget allows,
and what unseen data says of those. Each keeps its results, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, log
from statistics import NormalDist
from typing import Any

import torch
from msgspec.structs import replace
from torch.utils._pytree import tree_leaves

from attncc.driver.guarding import ROOM
from attncc.driver.planning import summary
from attncc.errors import PlanError
from attncc.passes.policies.hiding import Dropping
from attncc.plans import losses
from attncc.plans.certificate import accepts
from attncc.plans.choice import Options, Rung, ladder, nearest
from attncc.plans.costs import Costs
from attncc.plans.evaluation import Evaluator, UnderPlan
from attncc.plans.plan import SCHEMA, Budget, Certificate, Key, Plan, Rule, SitePlan, policy_of, verify_plan
from attncc.plans.probing import Probe, probe_language, probe_values
from attncc.plans.progressing import Saved, digest
from attncc.plans.tapping import Seen, Tapped
from attncc.version import __version__

#: Parts of the predicted budget at which plans are tried on the tuning samples.
_TRIED = (0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
#: Joint runs that `kappa` is taken from, and the samples of each.
_JOINT = 3
#: Calls of attentions under plans that a sample has at most, as far as which rows are looked at goes.
_CALLS = 1 << 16
#: Losses below this are rounding.
_NO_LOSS = 1e-9
#: Where joint runs measure nothing but rounding, predictions are not scaled down to nothing.
_LEAST_KAPPA = 0.01
#: At a speed, the limit that is certified is this many times the largest loss of the tuning samples.
_ROOM = 1.25
#: The share of the visible keys from which on a form counts as exact.
_WHOLE = 0.95

Progress = Callable[[str, int, int], None]
UserLoss = Callable[[torch.Tensor, torch.Tensor, Any], float]


@dataclass(frozen=True)
class Settings:
    """How much data goes where. `samples`, `tune`: elements of the data; `probes`: backward passes an element;
    `certify`: elements, the fewest that the budget's share allows where it is None; `tests`: plans certified at most,
    the safest first; `most_forms`: forms that the heads of one attention may take together, the exact one included."""

    samples: int = 16
    probes: int = 2
    tune: int = 8
    certify: int | None = None
    delta: float = 0.05
    tests: int = 2
    most_forms: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        whole = {"samples": self.samples, "probes": self.probes, "tune": self.tune, "tests": self.tests}
        for name, value in whole.items():
            if value < 1:
                raise PlanError(f"{name} is at least 1, not {value}")
        if not 0 < self.delta < 1:
            raise PlanError(f"delta is between 0 and 1, not {self.delta}")


class Switch:
    """A `Watcher` that hands on to another, which changes while the model stays compiled. It notes how many keys the
    calls have."""

    def __init__(self) -> None:
        self.to: Any = UnderPlan()
        self.keys: dict[Key, tuple[int, int]] = {}

    def form(self, seen: Seen) -> Any:
        lo, hi = self.keys.get(seen.key, (seen.keys, seen.keys))
        self.keys[seen.key] = min(lo, seen.keys), max(hi, seen.keys)
        return self.to.form(seen)

    def gave(self, seen: Seen, out: torch.Tensor) -> None:
        self.to.gave(seen, out)

    def backward(self, seen: Seen, out: torch.Tensor, gradient: torch.Tensor) -> None:
        self.to.backward(seen, out, gradient)


class Stages:
    """One profiling: the model under its taps, and what was asked for."""

    def __init__(
        self, model: Callable[[Any], torch.Tensor], switch: Switch, planner: Tapped, asked: Sequence[losses.Asked],
        settings: Settings, forms: tuple[str, ...], loss: UserLoss, language: bool, progress: Progress,
        missed: Callable[[str], None] | None = None,
    ) -> None:  # fmt: skip
        """`missed` is told of each budget that no plan meets, which is then left out; without it that is an error."""
        self.model, self.switch, self.planner = model, switch, planner
        self.asked, self.settings, self.forms, self.progress = asked, settings, forms, progress
        self.metric = asked[0].metric
        self.following = UnderPlan()
        self.evaluator = Evaluator(model, loss, self.following)
        self.language, self.missed = language, missed

    def plans(
        self, parts: tuple[list[Any], list[Any], list[Any]], saved: Saved, speed: float | None, uncertified: bool
    ) -> list[Plan]:
        samples, tuning, unseen = parts
        costs = self.costs(samples, saved)
        errors = self.errors(samples, saved)
        table = {key: _options(costs, key, error, self.forms) for key, error in errors.items() if key in costs.ms}
        rungs = ladder(table, self.settings.most_forms)
        if len(rungs) == 1:
            raise PlanError("no form is faster than the exact kernel here: only the exact model is left")
        sites = {n: self.sites(rung, costs, errors) for n, rung in enumerate(rungs)}
        kappa = self.kappa(samples, rungs, sites, saved)
        orders = self.tuned(tuning, rungs, sites, kappa, speed, saved)
        found: list[tuple[Certificate | None, int]] = [(None, order[-1] if order else 0) for _, order in orders]
        if not uncertified:
            found = self.certified(unseen, orders, sites, saved)
        if not any(order for _, order in orders):
            raise PlanError("no plan of these forms meets any of the budgets")
        lengths = list(self.switch.keys.values())
        plans = [
            Plan(
                SCHEMA, {"attncc": __version__, "torch": str(torch.__version__)}, machine(),
                tuple(self.planner.weights), tuple(self._bounded(sites[best], saved, best)),
                Budget(self.metric, limit, asked.share, speed), certificate,
                (min(lo for lo, _ in lengths), max(hi for _, hi in lengths)), kappa, kappa * rungs[best].error,
                tuple((rung.error, rung.cost) for rung in rungs), self.settings.seed,
            )
            for asked, (limit, order), (certificate, best) in zip(self.asked, orders, found, strict=True)
            if order
        ]  # fmt: skip
        saved.done()
        return [verify_plan(plan) for plan in plans]

    def _bounded(self, sites: dict[Key, SitePlan], saved: Saved, number: int) -> list[SitePlan]:
        """The sites of a plan with the bounds of their guards, as far as they were measured."""
        worst: dict[str, float] = saved.results.get("worst", {}).get(str(number), {})
        bounds = {_key(k): max(x * ROOM, _NO_LOSS) for k, x in worst.items()}
        return [replace(s, bound=bounds.get(key)) for key, s in sites.items()]

    def costs(self, samples: Sequence[Any], saved: Saved) -> Costs:
        """What each form of each site costs, on the sample with the most elements. Measured once: a ladder of other
        costs has other plans, of which what was kept of later stages says nothing."""
        self.progress("measuring forms", 0, 1)
        largest = max(samples, key=_elements)
        costs = Costs(self.forms)
        known: dict[str, dict[str, dict[str, float]]] | None = saved.results.get("costs")
        self.switch.to = costs if known is None else UnderPlan()
        if known is not None:
            costs.ms, costs.density = ({_key(k): v for k, v in known[x].items()} for x in ("ms", "density"))
        with torch.no_grad():
            found = self.model(largest)
        if not self.planner.sites:
            rest = f" ({self.planner.passed_over} are several joined)" if self.planner.passed_over else ""
            raise PlanError(f"the model has no attention that a plan can change{rest}; see attncc inspect")
        if not bool(found.isfinite().all()):
            raise PlanError("the exact model gives NaN or infinity on the data")
        if known is None:
            both = {"ms": costs.ms, "density": costs.density}
            saved.keep("costs", {name: {_text(k): v for k, v in x.items()} for name, x in both.items()})
        self.progress("measuring forms", 1, 1)
        return costs

    def errors(self, samples: Sequence[Any], saved: Saved) -> dict[Key, torch.Tensor]:
        """D of each form (the exact one first) and head of each site."""
        probe = self.switch.to = Probe(self.forms)
        total = len(samples) * self.settings.probes
        known: dict[str, Any] = saved.results.get("probe", {})
        probe.count = known.get("count", 0)
        probe.squares = {_key(k): torch.tensor(v, dtype=torch.float64) for k, v in known.get("squares", {}).items()}
        for at, inputs in enumerate(samples):
            generator = torch.Generator().manual_seed(self.settings.seed * 7919 + at)
            if (at + 1) * self.settings.probes <= probe.count:
                continue
            with torch.enable_grad():
                found = self.model(inputs)
                valid = losses.valid_of(inputs, found)
                for n in range(self.settings.probes):
                    self.progress("probing", probe.count, total)
                    made = (probe_language if self.language else probe_values)(found, valid, generator, probe.count)
                    made[0].backward(retain_graph=n + 1 < self.settings.probes)
                    probe.finish(made[1])
            del found
            squares = {_text(k): v.tolist() for k, v in probe.squares.items()}
            saved.keep("probe", {"count": probe.count, "squares": squares})
        self.progress("probing", total, total)
        exact = {k: torch.zeros(1, e.shape[1], dtype=torch.float64) for k, e in probe.errors().items()}
        return {k: torch.cat([exact[k], e]) for k, e in probe.errors().items()}

    def sites(self, rung: Rung, costs: Costs, errors: dict[Key, torch.Tensor]) -> dict[Key, SitePlan]:
        """What a plan of the ladder says of each site."""
        found: dict[Key, SitePlan] = {}
        for key, taken in rung.forms.items():
            site, ms = self.planner.sites[key], costs.ms[key]
            rules: list[Rule] = []
            for number in sorted({*taken} - {0}):
                text = self.forms[number - 1]
                heads = tuple(h for h, n in enumerate(taken) if n == number)
                wrong = errors[key][number, list(heads)].sum().item()
                rules.append(Rule(text, heads, round(costs.density[key].get(text, 1.0), 4), wrong))
            planned = sum(ms["" if n == 0 else self.forms[n - 1]] for n in taken) / len(taken)
            found[key] = SitePlan(
                *key[:2], site.phase, summary(site.attention), len(taken), self.switch.keys[key], tuple(rules),
                ms[""], planned,
            )  # fmt: skip
        return found

    def kappa(
        self, samples: Sequence[Any], rungs: Sequence[Rung], sites: dict[int, dict[Key, SitePlan]], saved: Saved
    ) -> float:
        """The measured loss of joint runs over the sum of predicted ones; 1 where the metric has no prediction."""
        if self.metric not in ("kl", "rel"):
            return 1.0
        if "kappa" in saved.results:
            return saved.results["kappa"]
        limit = self._scale(max(asked.limit for asked in self.asked))
        numbers = sorted({max(1, nearest(rungs, limit * part)) for part in (0.25, 0.5, 1.0)})
        self.switch.to = self.following
        ratios: list[float] = []
        for at, inputs in enumerate(samples[:_JOINT]):
            self.progress("joint runs", at, min(_JOINT, len(samples)))
            joint = self.evaluator.losses(inputs, [sites[n] for n in numbers])
            ratios += [self._scale(x) / rungs[n].error for x, n in zip(joint, numbers, strict=True) if rungs[n].error]
        found = max(sum(ratios) / len(ratios), _LEAST_KAPPA) if ratios else 1.0
        saved.keep("kappa", found)
        return found

    def _scale(self, loss: float) -> float:
        """A loss in the unit of the predicted error: D is of the square of the relative error."""
        return loss * loss if self.metric == "rel" else loss

    def tuned(
        self, tuning: Sequence[Any], rungs: Sequence[Rung], sites: dict[int, dict[Key, SitePlan]], kappa: float,
        speed: float | None, saved: Saved,
    ) -> list[tuple[float, list[int]]]:  # fmt: skip
        """For each budget (the limit, the plans to certify, the safest first): the fastest plans under which few enough
        samples will exceed the limit, by those of tuning, or the first at a speed."""
        self.switch.to = self.following
        tried = [self._tried(rungs, asked, kappa, speed) for asked in self.asked]
        numbers = sorted({n for each in tried for n in each})
        known: list[list[float]] = saved.results.get("tuning", [])
        for at, inputs in enumerate(tuning):
            self.progress("tuning", at, len(tuning))
            if at >= len(known):
                known = [*known, self.evaluator.losses(inputs, [sites[n] for n in numbers])]
                saved.keep("tuning", known)
        self.progress("tuning", len(tuning), len(tuning))
        by_plan = {n: [found[at] for found in known] for at, n in enumerate(numbers)}
        if speed is not None:
            return [(max(by_plan[own[0]]) * _ROOM, own) for own in tried]
        orders: list[tuple[float, list[int]]] = []
        for asked, own in zip(self.asked, tried, strict=True):
            expected = expected_most(by_plan, asked.share)
            fitting = [n for n in own if expected[n] <= asked.limit]
            if own and not fitting:
                self._miss(self._only_exact(asked, expected[own[0]]))
            orders.append((asked.limit, fitting[-self.settings.tests :]))
        return orders

    def _tried(
        self, rungs: Sequence[Rung], asked: losses.Asked, kappa: float, speed: float | None
    ) -> list[int]:
        """The plans that are tried for a budget, by their numbers."""
        if speed is not None:
            fast = [n for n, rung in enumerate(rungs) if rung.cost * speed <= rungs[0].cost]
            if not fast:
                most = rungs[0].cost / rungs[-1].cost
                raise PlanError(f"no plan is {speed:.3g} times as fast: the fastest of these forms is {most:.3g} times")
            return [fast[0]]
        theta = self._scale(asked.limit) / kappa
        numbers = sorted({nearest(rungs, theta * part) for part in _TRIED} - {0})
        if not numbers:
            self._miss(self._only_exact(asked, rungs[1].error * kappa))
        return numbers

    def _miss(self, why: str) -> None:
        """A budget that no plan meets."""
        if self.missed is None:
            raise PlanError(why)
        self.missed(why)

    def _only_exact(self, asked: losses.Asked, least: float) -> str:
        return (
            f"only the exact model meets {asked.metric}<={asked.limit:.3g}: the most careful plan of these forms "
            f"reaches {least:.3g}"
        )

    def certified(
        self, unseen: Sequence[Any], orders: Sequence[tuple[float, list[int]]],
        sites: dict[int, dict[Key, SitePlan]], saved: Saved,
    ) -> list[tuple[Certificate | None, int]]:  # fmt: skip
        """For each budget the certificate of the last plan in order that passes, with its number. Raises PlanError
        where none does."""
        self.switch.to = self.following
        self.switch.keys.clear()  # of the lengths that the certificate speaks of
        numbers = sorted({n for _, order in orders for n in order})
        known: list[list[float]] = saved.results.get("certifying", [])
        lengths: dict[str, list[int]] = saved.results.get("lengths", {})
        self.switch.keys |= {_key(k): (lo, hi) for k, (lo, hi) in lengths.items()}
        worst: dict[str, dict[str, float]] = saved.results.get("worst", {})
        self.following.measuring = True
        self.following.worst = {
            id(sites[n]): {_key(k): x for k, x in worst.get(str(n), {}).items()} for n in numbers
        }
        for at, inputs in enumerate(unseen):
            self.progress("certifying", at, len(unseen))
            if at >= len(known):
                self.following.calls = at * _CALLS
                known = [*known, self.evaluator.losses(inputs, [sites[n] for n in numbers])]
                saved.keep("certifying", known)
                saved.keep("lengths", {_text(k): list(v) for k, v in self.switch.keys.items()})
                found_worst = {str(n): self.following.worst[id(sites[n])] for n in numbers}
                saved.keep("worst", {n: {_text(k): x for k, x in own.items()} for n, own in found_worst.items()})
        self.progress("certifying", len(unseen), len(unseen))
        data = digest(unseen)
        found: list[tuple[Certificate | None, int]] = []
        for asked, (limit, order) in zip(self.asked, orders, strict=True):
            best: tuple[Certificate, int] | None = None
            failures = 0
            for tested, n in enumerate(order, 1):
                own = [x[numbers.index(n)] for x in known]
                failures = sum(x > limit for x in own)
                if not accepts(len(own), failures, 1 - asked.share, self.settings.delta):
                    break
                mean = sum(own) / len(own)
                best = Certificate(len(own), failures, self.settings.delta, tested, mean, max(own), data), n
            if best is None and order:
                self._miss(
                    f"the certificate failed: {failures} of {len(unseen)} unseen samples exceed "
                    f"{asked.metric}<={limit:.3g} under the safest plan; profile with more samples, or a wider budget"
                )
                order.clear()
            found.append(best or (None, 0))
        return found


def expected_most(by_plan: Mapping[int, Sequence[float]], share: float) -> dict[int, float]:
    """For each plan what the losses of a share of all samples, and half of the others, stay below, by the losses of a
    few: these spread about their mean on a logarithmic scale, as far under one plan as under another."""
    logs = {n: [log(max(x, _NO_LOSS)) for x in found] for n, found in by_plan.items()}
    means = {n: sum(x) / len(x) for n, x in logs.items()}
    count = len(next(iter(logs.values())))
    spread = sum((x - means[n]) ** 2 for n, found in logs.items() for x in found)
    free = len(logs) * (count - 1)
    deviation = (spread / free) ** 0.5 if free else 0.0
    far = NormalDist().inv_cdf((1 + share) / 2) * deviation * (1 + 1 / count) ** 0.5
    return {n: max(exp(mean + far), *by_plan[n]) for n, mean in means.items()}


def _options(costs: Costs, key: Key, error: torch.Tensor, forms: Sequence[str]) -> Options:
    """What a site may do: forms that keep nearly all keys gain nothing, whatever a noisy machine measured, but for
    those whose kernel finds what to leave out."""
    ms, kept = costs.ms[key], costs.density[key]
    gains = {text: kept.get(text, 1.0) < _WHOLE or isinstance(policy_of(text), Dropping) for text in forms}
    cost = [ms[""], *(ms.get(text, float("nan")) if gains[text] else float("nan") for text in forms)]
    return Options(torch.tensor(cost, dtype=torch.float64), error)


def _elements(inputs: Any) -> int:
    return sum(x.numel() for x in tree_leaves(inputs) if isinstance(x, torch.Tensor))


def _text(key: Key) -> str:
    return "\n".join(map(str, key))


def _key(text: str) -> Key:
    path, place, phase = text.split("\n")
    return path, int(place), phase


def machine() -> str:
    """The processor and its instruction set, in one line."""
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
