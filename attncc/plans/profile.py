"""`attncc.profile`: which approximate form each head of a model takes, within a budget, with a certificate.

The data is split in three, at random: one part tells what each form of each head does to the output and costs, one
finds how much of that the budget allows, and one, unseen, certifies. See docs/plans.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attncc.errors import PlanError
from attncc.plans import losses
from attncc.plans.certificate import needed
from attncc.plans.evaluation import call
from attncc.plans.forms import chosen
from attncc.plans.plan import Plan
from attncc.plans.progressing import Saved, digest
from attncc.plans.stages import Progress, Settings, Stages, Switch, UserLoss
from attncc.plans.tapping import tapped
from attncc.version import __version__

__all__ = ["Settings", "profile", "profile_for"]


def profile(
    model: Callable[..., Any], data: Iterable[Any], budget: str = "kl<=0.02@95%", *, speed: float | None = None,
    forms: Sequence[str] | None = None, settings: Settings | None = None, uncertified: bool = False,
    loss: UserLoss | None = None, output: Callable[[Any], torch.Tensor] = losses.output_of,
    unseen: Iterable[Any] | None = None, resume: str | Path | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Plan:  # fmt: skip
    """The fastest plan for `model` within `budget`, certified on data that it was not made from.

    `data` gives inputs: tensors, tuples of arguments or mappings of keyword arguments, each of them one sample, as many
    as `budget` and `settings` need. `budget` is like `kl<=0.02@95%` (nats a token), `flips<=0.01`, `rel<=0.05`, or
    `name<=x` with `loss(exact, planned, inputs)`. With `speed`, instead, the least error at which attention is that
    many times as fast; the metric of `budget` then says what error is. `forms` are policies (docs/policies.md).
    `output` takes the tensor that is compared from what the model gives. `unseen` are the inputs to certify on, where
    they are to be others than a part of `data` (longer ones); the certificate speaks of inputs like those. `resume` is
    a file in which progress is kept. Raises PlanError, in one line, where the data is too little, the model has no
    attention, or a loss is no number."""
    (plan,) = profile_for(
        model, data, [budget], speed=speed, forms=forms, settings=settings, uncertified=uncertified, loss=loss,
        output=output, unseen=unseen, resume=resume, progress=progress,
    )  # fmt: skip
    return plan


def profile_for(
    model: Callable[..., Any], data: Iterable[Any], budgets: Sequence[str], *, speed: float | None = None,
    forms: Sequence[str] | None = None, settings: Settings | None = None, uncertified: bool = False,
    loss: UserLoss | None = None, output: Callable[[Any], torch.Tensor] = losses.output_of,
    unseen: Iterable[Any] | None = None, resume: str | Path | None = None,
    progress: Progress = lambda what, done, total: None, missed: Callable[[str], None] | None = None,
) -> list[Plan]:  # fmt: skip
    """`profile` for several budgets of one metric, from the same runs: a plan for each. Every plan is certified on the
    same data, each certificate by itself. With `missed`, budgets that no plan meets are left out and it is told of
    them; PlanError where none is left."""
    settings = settings or Settings()
    asked = [losses.parse_budget(budget) for budget in budgets]
    (metric, *others) = dict.fromkeys(x.metric for x in asked)
    if others:
        raise PlanError(f"budgets of one profile have one metric, not {metric} and {', '.join(others)}")
    measure = loss if loss is not None else losses.METRICS.get(metric)
    if measure is None:
        raise PlanError(f"there is no metric {metric!r}; there are {', '.join(losses.METRICS)}, or pass `loss`")
    if speed is not None and not speed > 1:
        raise PlanError(f"a speed is above 1, not {speed}")
    if isinstance(model, nn.Module) and model.training:
        raise PlanError("the model is in training mode; call model.eval() first")
    tried = chosen(forms)
    strictest = max(asked, key=lambda x: x.share)
    wanted = 0 if uncertified else settings.certify or needed(1 - strictest.share, settings.delta)
    parts = split(data, (settings.samples, settings.tune, 0 if unseen is not None else wanted), settings, strictest)
    if unseen is not None and wanted:
        parts = (*parts[:2], split(unseen, (0, 0, wanted), settings, strictest)[2])

    def compared(exact: torch.Tensor, planned: torch.Tensor, inputs: Any) -> float:
        if loss is not None:
            return float(loss(exact, planned, inputs))
        return losses.METRICS[metric](exact, planned, losses.valid_of(inputs, exact))

    with _without_learning(model), tapped(Switch()) as (planner, compiled):
        switch = planner.watcher
        assert isinstance(switch, Switch)
        under = compiled(model)
        language = loss is None and metric in losses.OF_PREDICTIONS
        run = Stages(
            lambda inputs: output(call(under, inputs)), switch, planner, asked, settings, tried, compared, language,
            progress, missed,
        )  # fmt: skip
        saved_key = digest([x for part in parts for x in part], tried, settings, asked, __version__, speed)
        return run.plans(parts, Saved.at(None if resume is None else Path(resume), saved_key), speed, uncertified)


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


@contextmanager
def _without_learning(model: Any) -> Iterator[None]:
    """No parameter of a model learns inside: only what attentions give is differentiated."""
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    learnt = [p.requires_grad for p in parameters]
    try:
        for p in parameters:
            p.requires_grad_(False)
        yield
    finally:
        for p, learns in zip(parameters, learnt, strict=True):
            p.requires_grad_(learns)
