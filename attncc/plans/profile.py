"""`attncc.profile`: which approximate form each head of a model takes, within a budget, with a certificate.

The data is split in three, at random: one part tells what each form of each head does to the output and costs, one
finds how much of that the budget allows, and one, unseen, certifies. See docs/plans.md.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from attncc.driver.planning import summary
from attncc.errors import PlanError
from attncc.plans import losses
from attncc.plans.certificate import accepts, needed
from attncc.plans.choice import Options, Rung, ladder, nearest
from attncc.plans.costs import Costs
from attncc.plans.evaluation import Evaluator, Following, call
from attncc.plans.forms import chosen
from attncc.plans.plan import SCHEMA, Budget, Certificate, Plan, Rule, SitePlan, verify_plan
from attncc.plans.probing import Probe, probe_language, probe_values
from attncc.plans.progressing import Saved, digest
from attncc.plans.tapping import Key, Seen, Tapped, tapped
from attncc.version import __version__

#: Parts of the predicted budget at which plans are tried on the tuning samples.
_TRIED = (0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
#: Joint runs that `kappa` is taken from, and the samples of each.
_JOINT = 3
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


def profile(
    model: Callable[..., Any], data: Iterable[Any], budget: str = "kl<=0.02@95%", *, speed: float | None = None,
    forms: Sequence[str] | None = None, settings: Settings | None = None, uncertified: bool = False,
    loss: UserLoss | None = None, output: Callable[[Any], torch.Tensor] = losses.output_of,
    resume: str | Path | None = None, progress: Progress = lambda what, done, total: None,
) -> Plan:  # fmt: skip
    """The fastest plan for `model` within `budget`, certified on data that it was not made from.

    `data` gives inputs: tensors, tuples of arguments or mappings of keyword arguments, each of them one sample, as many
    as `budget` and `settings` need. `budget` is like `kl<=0.02@95%` (nats a token), `flips<=0.01`, `rel<=0.05`, or
    `name<=x` with `loss(exact, planned, inputs)`. With `speed`, instead, the least error at which attention is that
    many times as fast; the metric of `budget` then says what error is. `forms` are policies (docs/policies.md).
    `output` takes the tensor that is compared from what the model gives. `resume` is a file in which progress is kept.
    Raises PlanError, in one line, where the data is too little, the model has no attention, or a loss is no number."""
    settings = settings or Settings()
    asked = losses.parse_budget(budget)
    measure = loss if loss is not None else losses.METRICS.get(asked.metric)
    if measure is None:
        raise PlanError(f"there is no metric {asked.metric!r}; there are {', '.join(losses.METRICS)}, or pass `loss`")
    if speed is not None and not speed > 1:
        raise PlanError(f"a speed is above 1, not {speed}")
    if isinstance(model, nn.Module) and model.training:
        raise PlanError("the model is in training mode; call model.eval() first")
    alpha = 1 - asked.share
    wanted = 0 if uncertified else settings.certify or needed(alpha, settings.delta)
    parts = split(data, (settings.samples, settings.tune, wanted), settings, asked)
    own_loss = loss is not None

    def compared(exact: torch.Tensor, planned: torch.Tensor, inputs: Any) -> float:
        if own_loss:
            return float(measure(exact, planned, inputs))
        return measure(exact, planned, losses.valid_of(inputs, exact))

    tried = chosen(forms)
    with _without_learning(model), tapped(_Switch()) as (planner, compiled):
        switch = planner.watcher
        assert isinstance(switch, _Switch)
        under = compiled(model)
        run = _Run(
            lambda inputs: output(call(under, inputs)), switch, planner, asked, settings, tried, compared,
            losses.OF_PREDICTIONS if not own_loss else (), progress,
        )  # fmt: skip
        saved_key = digest([x for part in parts for x in part], tried, settings, asked, __version__, speed)
        return run.plan(parts, Saved.at(None if resume is None else Path(resume), saved_key), speed, uncertified)


def split(
    data: Iterable[Any], sizes: tuple[int, int, int], settings: Settings, asked: losses.Asked
) -> tuple[list[Any], list[Any], list[Any]]:
    """The data in three parts that share no element, at random. Raises PlanError where there is too little."""
    total = sum(sizes)
    items = list(islice(iter(data), total))
    if len(items) < total:
        profile_, tune, certify = sizes
        raise PlanError(
            f"the data has {len(items)} samples, {total - len(items)} too few: {profile_} to profile, {tune} to tune "
            f"and {certify} to certify that at most {1 - asked.share:.3g} of inputs exceed the limit "
            f"(with confidence {1 - settings.delta:.3g}); give more, ask for a smaller share, or pass --uncertified"
        )
    order = torch.randperm(total, generator=torch.Generator().manual_seed(settings.seed)).tolist()
    mixed = [items[n] for n in order]
    first, second = sizes[0], sizes[0] + sizes[1]
    return mixed[:first], mixed[first:second], mixed[second:]


class _without_learning:
    """No parameter of a model learns inside: only what attentions give is differentiated."""

    def __init__(self, model: Any) -> None:
        self.parameters = list(model.parameters()) if isinstance(model, nn.Module) else []

    def __enter__(self) -> None:
        self.learnt = [p.requires_grad for p in self.parameters]
        for p in self.parameters:
            p.requires_grad_(False)

    def __exit__(self, *_: object) -> None:
        for p, learns in zip(self.parameters, self.learnt, strict=True):
            p.requires_grad_(learns)


class _Switch:
    """A `Watcher` that hands on to another, which changes while the model stays compiled. It notes how many keys the
    calls have, and the last call of each site."""

    def __init__(self) -> None:
        self.to: Any = Following()
        self.keys: dict[Key, tuple[int, int]] = {}
        self.last: dict[Key, Seen] = {}
        self.keep = False

    def form(self, seen: Seen) -> Any:
        lo, hi = self.keys.get(seen.key, (seen.keys, seen.keys))
        self.keys[seen.key] = min(lo, seen.keys), max(hi, seen.keys)
        if self.keep:
            self.last[seen.key] = seen
        return self.to.form(seen)

    def backward(self, seen: Seen, out: torch.Tensor, gradient: torch.Tensor) -> None:
        self.to.backward(seen, out, gradient)


class _Run:
    """One profiling: the model under its taps, and what was asked for."""

    def __init__(
        self, model: Callable[[Any], torch.Tensor], switch: _Switch, planner: Tapped, asked: losses.Asked,
        settings: Settings, forms: tuple[str, ...], loss: UserLoss, of_predictions: Sequence[str], progress: Progress,
    ) -> None:  # fmt: skip
        self.model, self.switch, self.planner = model, switch, planner
        self.asked, self.settings, self.forms, self.progress = asked, settings, forms, progress
        self.following = Following()
        self.evaluator = Evaluator(model, loss, self.following)
        self.language = asked.metric in of_predictions

    def plan(
        self, parts: tuple[list[Any], list[Any], list[Any]], saved: Saved, speed: float | None, uncertified: bool
    ) -> Plan:
        samples, tuning, unseen = parts
        costs = self.costs(samples)
        errors = self.errors(samples, saved)
        table = {key: _options(costs, key, error, self.forms) for key, error in errors.items() if key in costs.ms}
        rungs = ladder(table, self.settings.most_forms)
        if len(rungs) == 1:
            raise PlanError("no form is faster than the exact kernel here: only the exact model is left")
        sites = {n: self.sites(rung, costs, errors) for n, rung in enumerate(rungs)}
        kappa = self.kappa(samples, rungs, sites, saved)
        limit, order = self.tuned(tuning, rungs, sites, kappa, speed, saved)
        budget = Budget(self.asked.metric, limit, self.asked.share, speed)
        certificate, best = (None, order[-1]) if uncertified else self.certified(unseen, order, sites, limit, saved)
        lengths = list(self.switch.keys.values())
        plan = Plan(
            SCHEMA, {"attncc": __version__, "torch": str(torch.__version__)}, machine(), tuple(self.planner.weights),
            tuple(sites[best].values()), budget, certificate,
            (min(lo for lo, _ in lengths), max(hi for _, hi in lengths)), kappa, kappa * rungs[best].error,
            tuple((rung.error, rung.cost) for rung in rungs), self.settings.seed,
        )  # fmt: skip
        saved.done()
        return verify_plan(plan)

    def costs(self, samples: Sequence[Any]) -> Costs:
        """What each form of each site costs, on the sample with the most elements."""
        self.progress("measuring forms", 0, 1)
        largest = max(samples, key=_elements)
        costs = self.switch.to = Costs(self.forms)
        self.switch.keep = True
        with torch.no_grad():
            found = self.model(largest)
        self.switch.keep = False
        if not self.planner.sites:
            rest = f" ({self.planner.passed_over} are several joined)" if self.planner.passed_over else ""
            raise PlanError(f"no attention was found in the model that a plan can speak of{rest}; see attncc inspect")
        if not bool(found.isfinite().all()):
            raise PlanError("the exact model gives NaN or infinity on the data")
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
        if self.asked.metric not in ("kl", "rel"):
            return 1.0
        if "kappa" in saved.results:
            return saved.results["kappa"]
        limit = self._scale(self.asked.limit)
        numbers = sorted({max(1, nearest(rungs, limit * part)) for part in (0.25, 0.5, 1.0)})
        self.switch.to = self.following
        ratios: list[float] = []
        for at, inputs in enumerate(samples[:_JOINT]):
            self.progress("joint runs", at, min(_JOINT, len(samples)))
            joint = self.evaluator.losses(inputs, [sites[n] for n in numbers])
            ratios += [self._scale(x) / rungs[n].error for x, n in zip(joint, numbers, strict=True) if rungs[n].error]
        found = sum(ratios) / len(ratios) if ratios else 1.0
        saved.keep("kappa", found)
        return found

    def _scale(self, loss: float) -> float:
        """A loss in the unit of the predicted error: D is of the square of the relative error."""
        return loss * loss if self.asked.metric == "rel" else loss

    def tuned(
        self, tuning: Sequence[Any], rungs: Sequence[Rung], sites: dict[int, dict[Key, SitePlan]], kappa: float,
        speed: float | None, saved: Saved,
    ) -> tuple[float, list[int]]:  # fmt: skip
        """(the limit, the plans to certify, the safest first): the fastest that no tuning sample exceeds the limit
        under, or the first at a speed."""
        self.switch.to = self.following
        if speed is not None:
            fast = [n for n, rung in enumerate(rungs) if rung.cost * speed <= rungs[0].cost]
            if not fast:
                most = rungs[0].cost / rungs[-1].cost
                raise PlanError(f"no plan is {speed:.3g} times as fast: the fastest of these forms is {most:.3g} times")
            numbers = [fast[0]]
        else:
            theta = self._scale(self.asked.limit) / kappa
            numbers = sorted({nearest(rungs, theta * part) for part in _TRIED} - {0})
        if not numbers:
            raise PlanError(self._only_exact(rungs[1].error * kappa))
        worst = dict.fromkeys(numbers, 0.0)
        known: list[list[float]] = saved.results.get("tuning", [])
        for at, inputs in enumerate(tuning):
            self.progress("tuning", at, len(tuning))
            if at < len(known):
                found = known[at]
            else:
                found = self.evaluator.losses(inputs, [sites[n] for n in numbers])
                known = [*known, found]
                saved.keep("tuning", known)
            worst = {n: max(worst[n], x) for n, x in zip(numbers, found, strict=True)}
        self.progress("tuning", len(tuning), len(tuning))
        if speed is not None:
            return worst[numbers[0]] * 1.25, numbers
        fitting = [n for n in numbers if worst[n] <= self.asked.limit]
        if not fitting:
            raise PlanError(self._only_exact(worst[numbers[0]]))
        return self.asked.limit, fitting[-self.settings.tests :]

    def _only_exact(self, least: float) -> str:
        return (
            f"only the exact model meets {self.asked.metric}<={self.asked.limit:.3g}: the most careful plan of these "
            f"forms reaches {least:.3g}"
        )

    def certified(
        self, unseen: Sequence[Any], order: Sequence[int], sites: dict[int, dict[Key, SitePlan]], limit: float,
        saved: Saved,
    ) -> tuple[Certificate, int]:  # fmt: skip
        """The certificate of the last plan in order that passes, with its number. Raises PlanError where none does."""
        self.switch.to = self.following
        self.switch.keys.clear()  # of the lengths that the certificate speaks of
        known: list[list[float]] = saved.results.get("certifying", [])
        lengths: dict[str, list[int]] = saved.results.get("lengths", {})
        self.switch.keys |= {_key(k): (lo, hi) for k, (lo, hi) in lengths.items()}
        for at, inputs in enumerate(unseen):
            self.progress("certifying", at, len(unseen))
            if at >= len(known):
                known = [*known, self.evaluator.losses(inputs, [sites[n] for n in order])]
                saved.keep("certifying", known)
                saved.keep("lengths", {_text(k): list(v) for k, v in self.switch.keys.items()})
        self.progress("certifying", len(unseen), len(unseen))
        alpha, delta = 1 - self.asked.share, self.settings.delta
        best: tuple[Certificate, int] | None = None
        failures = 0
        for tested, n in enumerate(order, 1):
            own = [x[tested - 1] for x in known]
            failures = sum(x > limit for x in own)
            if not accepts(len(own), failures, alpha, delta):
                break
            mean, data = sum(own) / len(own), digest(unseen)
            best = Certificate(len(own), failures, delta, tested, mean, max(own), data), n
        if best is None:
            raise PlanError(
                f"the certificate failed: {failures} of {len(unseen)} unseen samples exceed "
                f"{self.asked.metric}<={limit:.3g} under the safest plan; profile with more samples, or a wider budget"
            )
        return best


def _options(costs: Costs, key: Key, error: torch.Tensor, forms: Sequence[str]) -> Options:
    """What a site may do: forms that keep nearly all keys gain nothing, whatever a noisy machine measured."""
    ms, kept = costs.ms[key], costs.density[key]
    cost = [ms[""], *(ms[text] if kept.get(text, 1.0) < _WHOLE else float("nan") for text in forms)]
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
