"""Never slower under a plan either: a form that was not timed when the plan was made is timed against the exact one."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import fx

from attncc.driver.baseline import Trial, Untimeable, looks, trial
from attncc.driver.running import compiled, run
from attncc.driver.training import Training
from attncc.driver.training_selection import leaves_of, whole_step
from attncc.ir import Attention, Program
from attncc.ir.expr import Expr, loads
from attncc.ir.interpret import extent
from attncc.ir.reasons import Reason, because
from attncc.passes.pipeline import standard
from attncc.passes.rewrites.row_sums import with_sums
from attncc.patterns.graph.facts import Facts
from attncc.patterns.site.assemble import Lifted
from attncc.patterns.site.program import SiteProgram
from attncc.runtime.measure import TIE, compare, sampler_for
from attncc.runtime.recent import Recent

BUDGET_S = 0.15
#: Layers whose forms are alike are timed once.
_timed = Recent[object, Reason | None](256)


def slower(
    site: SiteProgram, planned: Program, lifted: Lifted, facts: Facts, training: Training | None
) -> Reason | None:
    """Why a planned program is no faster on made-up data of its shapes, or None: than the exact one in inference, with
    its backward than the model's own form in `training`."""
    try:
        known = (site.program, planned, training is not None, looks(lifted, facts))
        if known not in _timed:
            data = _data(site, lifted, facts, () if training is None else training.nodes)
            _timed[known] = None if data is None else _slower(site, planned, data, training)
        return _timed[known]
    except Untimeable:
        return None


@dataclass(frozen=True)
class _Data:
    """Made-up inputs of a program, by name, its sizes, and the trial that they come from."""

    values: dict[str, torch.Tensor]
    sizes: dict[Expr, int]
    trial: Trial


def _data(site: SiteProgram, lifted: Lifted, facts: Facts, learned: Collection[fx.Node]) -> _Data | None:
    data = trial([lifted], facts, learned)
    (tensors,) = data.tensors()
    a = lifted.attention
    if not _gathers(a):  # positions: a row at the end sees all keys, and so costs what it may cost
        last = extent(a.j.extent, dict(zip(a.sizes, data.sizes[0], strict=True))) - 1
        for t in tensors:
            if not t.dtype.is_floating_point and t.dtype != torch.bool:
                t.fill_(last)
    by_node = dict(zip(zip(lifted.tensors, lifted.dtypes, strict=True), tensors, strict=True))
    values = {
        t.name: by_node[n, dtype] for t, n, dtype in zip(site.program.inputs, site.inputs, site.dtypes, strict=True)
    }
    own = dict(zip(lifted.sizes, data.sizes[0], strict=True))
    sizes: dict[Expr, int] = {s: own[x] for s, x in zip(site.program.sizes, site.sizes, strict=True) if x in own}
    return _Data(values, sizes, data) if len(sizes) == len(site.program.sizes) else None


def _slower(site: SiteProgram, planned: Program, data: _Data, training: Training | None) -> Reason | None:
    form = standard(site.factors).run(planned)
    device = next(iter(data.values.values())).device
    if training is None:
        exact = standard(site.factors).run(site.program)
        with torch.no_grad():
            programs = {"other": exact, "planned": form}
            made = {name: compiled(p, data.values, data.sizes) for name, p in programs.items()}
            calls = {name: partial(call, data.values) for name, call in made.items()}
            us = compare(calls, BUDGET_S, sampler_for(device)).us
    else:
        form = with_sums(form, [True])
        again = training.recomputed
        own = whole_step(data.trial.run, leaves_of(data.trial.inputs), nullcontext, again)
        ours = whole_step(
            lambda: run(form, data.values, data.sizes), leaves_of(data.trial.known.values()), nullcontext, again
        )
        us = compare({"other": own, "planned": ours}, BUDGET_S, sampler_for(device)).us
    if "other" not in us or "planned" not in us or us["planned"] < us["other"] * (1 - TIE):
        return None
    other, mine = f"{us['other']:.1f}", f"{us['planned']:.1f}"
    return because("plan-slower" if training is None else "plan-slower-training", other, mine)


def _gathers(a: Attention) -> bool:
    """Whether integers that an attention reads are indices into other tensors."""
    return any(loads(index) for load in loads(*a.expressions()) for index in load.index)
