"""Never slower under a plan either: a form that was not timed when the plan was made is timed against the exact one."""

from __future__ import annotations

import torch

from attncc.driver.baseline import Untimeable, looks, trial
from attncc.driver.running import compiled
from attncc.ir import Attention, Program
from attncc.ir.expr import Expr, loads
from attncc.ir.interpret import extent
from attncc.ir.reasons import Reason, because
from attncc.passes.pipeline import standard
from attncc.patterns.graph.facts import Facts
from attncc.patterns.site.assemble import Lifted
from attncc.patterns.site.program import SiteProgram
from attncc.runtime.measure import TIE, compare, sampler_for
from attncc.runtime.recent import Recent

BUDGET_S = 0.15
#: Layers whose forms are alike are timed once.
_timed = Recent[object, Reason | None](256)


def slower(site: SiteProgram, planned: Program, lifted: Lifted, facts: Facts) -> Reason | None:
    """Why a planned program is no faster than the exact one on made-up data of its shapes, or None."""
    try:
        known = (site.program, planned, looks(lifted, facts))
        if known not in _timed:
            _timed[known] = _slower(site, planned, lifted, facts)
        return _timed[known]
    except Untimeable:
        return None


def _slower(site: SiteProgram, planned: Program, lifted: Lifted, facts: Facts) -> Reason | None:
    data = trial([lifted], facts)
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
    if len(sizes) != len(site.program.sizes):
        return None
    with torch.no_grad():
        calls = {
            name: compiled(standard(site.factors).run(p), values, sizes)
            for name, p in (("exact", site.program), ("planned", planned))
        }
        us = compare(calls, BUDGET_S, sampler_for(tensors[0].device)).us
    if "exact" not in us or "planned" not in us or us["planned"] < us["exact"] * (1 - TIE):
        return None
    return because("plan-slower", f"{us['exact']:.1f}", f"{us['planned']:.1f}")


def _gathers(a: Attention) -> bool:
    """Whether integers that an attention reads are indices into other tensors."""
    return any(loads(index) for load in loads(*a.expressions()) for index in load.index)
