"""What a plan makes of the attentions of a graph.

A plan speaks of sites by their module, their number among the attentions of that module in one graph, and the phase.
What it says holds for the numbers of keys that it was certified for: elsewhere a site runs exact. Where a length is
symbolic, asking whether it lies in the range adds a guard, so that Dynamo compiles the other case for itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx

from attncc.driver.caches import Cache, cache_of
from attncc.driver.describe import equation
from attncc.driver.guarding import guarded_arguments
from attncc.errors import PlanError
from attncc.ir import Attention, Axis, Const, Program
from attncc.ir.reasons import Reason, because
from attncc.passes.pipeline import standard
from attncc.passes.policies import CLOSED_FORMS
from attncc.passes.policies.hiding import Composed, Form, Policy, hide, misfit
from attncc.passes.policies.parts import is_effect
from attncc.passes.policies.places import head_count
from attncc.patterns.graph.facts import Facts
from attncc.patterns.site.assemble import Lifted
from attncc.plans.plan import Key, Phase, Plan, Rule, SitePlan, policy_of
from attncc.report.site import HeadForm, ranges

#: Rows from which on a call fills a cache rather than reads it.
PREFILL_ROWS = 17
#: Values of a parameter that its fingerprint reads.
_SAMPLED = 64


@dataclass(frozen=True)
class PlannedSite:
    """An attention as a plan sees it: its module, its number among those of the module in the graph, its node, and how
    many rows and keys it has in this graph, numbers or symbols. `cached`: boxes of its keys can be kept beside them."""

    path: str
    place: int
    attention: Attention
    rows: Any
    keys: Any
    cached: bool = False

    @property
    def key(self) -> Key:
        return self.path, self.place, self.phase

    @property
    def phase(self) -> Phase:
        return "prefill" if self.rows >= PREFILL_ROWS else "decode"


class Planner(Protocol):
    """Who decides which form the attentions of a graph take. `notes` are what the user should know of that."""

    notes: list[str]

    def begin(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Sees the parameters of a graph, before its sites. Raises PlanError."""
        ...

    def take(self, site: PlannedSite, p: Program) -> Program | Reason | None:
        """The program of a site in its form; the reason why it is exact though a form was meant; None where none was.
        Raises PlanError."""
        ...

    def timed(self, site: PlannedSite) -> bool:
        """Whether the form of a site was timed in this phase, on the model's own tensors."""
        ...

    def says(self, site: PlannedSite) -> str:
        """What the plan says of a site, in one line."""
        ...

    def forms(self, site: PlannedSite) -> tuple[HeadForm, ...]:
        """The same as values: what some of its heads do, and then the others."""
        ...

    def made(self, site: PlannedSite, taken: Program, final: Program, call: fx.Node) -> None:
        """Sees the calls of attncc's operator that a site became: `taken` is its program, `final` that after the
        passes."""
        ...


class Places:
    """Numbers the attentions of each module of one graph."""

    def __init__(self) -> None:
        self._next: dict[str, int] = {}

    def site(self, path: str, lifted: Lifted, facts: Facts) -> PlannedSite | None:
        """None where no dimension of an operand tells a symbolic length: no plan can speak of that attention."""
        place = self._next.get(path, 0)
        self._next[path] = place + 1
        a = lifted.attention
        rows, keys = (_extent(lifted, axis, facts) for axis in (a.i, a.j))
        if rows is None or keys is None:
            return None
        return PlannedSite(path, place, a, rows, keys, cached=_cached(lifted, facts))


def _cached(lifted: Lifted, facts: Facts) -> bool:
    """Whether the keys of an attention are a cache that boxes can be kept beside."""
    a = lifted.attention
    k = lifted.tensors[[t.name for t in a.tensors].index(a.k.tensor)]
    return a.j.index in a.k.index and isinstance(cache_of(k, a.k.index.index(a.j.index), facts), Cache)


def _extent(lifted: Lifted, axis: Axis, facts: Facts) -> Any:
    """The extent of an axis: a number, or the symbol that a dimension of an operand has; None where none has it."""
    if isinstance(axis.extent, Const):
        return int(axis.extent.value)
    a = lifted.attention
    for access in (a.q, a.k, a.v):
        if axis.index in access.index:
            at = [t.name for t in a.tensors].index(access.tensor)
            return facts.value(lifted.tensors[at]).shape[access.index.index(axis.index)]
    return None


def summary(a: Attention) -> str:
    """An attention in one line without its lengths and mask: `9 heads of 64 and 64, f32: softmax(s * 0.125) v`."""
    return f"{head_count(a)} heads of {a.d.extent!r} and {a.e.extent!r}, {a.dtype}: {equation(a)}"


def head_forms(planned: SitePlan) -> tuple[HeadForm, ...]:
    """What each rule of a site's plan says of its heads, and the heads that stay exact."""
    found = [HeadForm(r.form, r.heads, r.density, r.error) for r in planned.rules if r.heads]
    rest = sorted({*range(planned.heads)} - {h for f in found for h in f.heads})
    return (*found, *([HeadForm("exact", tuple(rest), 1.0, 0.0)] if rest else []))


def in_words(planned: SitePlan) -> str:
    """`streaming{sinks=64,window=256} on heads 0-3 (31% of the keys, error 1.2e-04), exact on 4-8; 12.1 ms, exact 30.2
    ms`."""
    parts = [
        f"{r.form} on heads {ranges(r.heads)} ({r.density:.0%} of the keys, {_error_of(r)})"
        for r in planned.rules
        if r.heads
    ]
    rest = sorted({*range(planned.heads)} - {h for r in planned.rules for h in r.heads})
    parts += [f"exact on {ranges(rest)}"] if rest else []
    return f"{', '.join(parts)}; {planned.ms:.2f} ms, exact {planned.exact_ms:.2f} ms"


def _error_of(rule: Rule) -> str:
    return "an effect, no approximation" if is_effect(policy_of(rule.form)) else f"error {rule.error:.1e}"


def is_closed(policy: Policy) -> bool:
    """Whether a policy keeps keys by their positions alone."""
    return isinstance(policy, CLOSED_FORMS)


class Following:
    """Follows a plan. `notes` say what of it could not be followed, once each. `guard`: its calls are guarded."""

    def __init__(self, plan: Plan, *, guard: bool = False) -> None:
        self.plan, self.guard = plan, guard
        self.notes: list[str] = []
        self._exact: dict[Key, Program] = {}
        self._sites = {s.key: s for s in plan.sites}

    def begin(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        known = {*self.plan.weights}
        other = sum(fingerprint(x) not in known for x in parameters)
        if other:
            raise PlanError(
                f"the plan is for other weights: {other} of the {len(parameters)} parameters of this graph are not "
                "those of the profiled model (their values, shapes or dtypes differ)"
            )

    def take(self, site: PlannedSite, p: Program) -> Program | Reason | None:
        planned = self._site(site)
        if planned is None or not planned.sparse:
            return None
        what = summary(site.attention)
        if what != planned.what:
            raise PlanError(
                f"the plan is for another graph: at {site.path or 'the top level'} it has {planned.what}, the model "
                f"has {what}"
            )
        lo, hi = self.plan.lengths
        lo = lo if planned.phase == site.phase else 1  # a row of a prefill, of which there are those with few keys
        if not bool(lo <= site.keys) or not bool(site.keys <= hi):
            self._say(f"the plan holds for {lo} to {hi} keys; calls with other numbers of keys run exact")
            return because("policy-other-length", str(lo), str(hi))
        self._exact[site.key] = p
        return planned_program(p, planned.forms())

    def _site(self, site: PlannedSite) -> SitePlan | None:
        """What the plan says of a site. Where all forms go by positions alone, a decoding step is the next row of a
        prefill, of which the certificate speaks too."""
        own = self._sites.get(site.key)
        if own is None and site.phase == "decode":
            own = self._sites.get((site.path, site.place, "prefill"))
            own = own if own is not None and all(is_closed(form.policy) for form in own.forms()) else None
        return own

    def timed(self, site: PlannedSite) -> bool:
        return site.key in self._sites

    def says(self, site: PlannedSite) -> str:
        planned = self._site(site)
        return "" if planned is None else in_words(planned)

    def forms(self, site: PlannedSite) -> tuple[HeadForm, ...]:
        planned = self._site(site)
        return () if planned is None else head_forms(planned)

    def made(self, site: PlannedSite, taken: Program, final: Program, call: fx.Node) -> None:
        exact, planned = self._exact.pop(site.key, None), self._site(site)
        if not self.guard or exact is None or planned is None or taken == exact:
            return
        if planned.bound is None:
            self._say("the plan has no bounds for its guard: it was made without a certificate, or by an older version")
            return
        if torch.is_grad_enabled():
            self._say("calls with gradients are not guarded; the guard works under torch.no_grad()")
            return
        name = f"{site.path or '(top level)'}{f' ({site.place})' if site.place else ''}, {site.phase}"
        if any(isinstance(form.policy, Composed) for form in planned.forms()):
            self._say(f"{name} cannot be guarded: its output is put together after its attention")
            return
        more = guarded_arguments(final, standard().run(exact), name, planned.bound)
        if more is None:
            self._say(f"{name} cannot be guarded: its exact form reads what its approximate one does not")
            return
        call.target = torch.ops.attncc.guarded.default
        call.args = (*call.args, *more)

    def _say(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


def planned_program(p: Program, forms: Sequence[Form]) -> Program | Reason:
    """The program with the forms in its attention; the reason where a form means nothing there."""
    for step in p.steps:
        if isinstance(step.node, Attention):
            for form in forms:
                reason = misfit(step.node, form)
                if reason is not None:
                    return reason
    return hide(p, *forms)


def fingerprint(x: torch.Tensor) -> str:
    """What tells a parameter from others: its dtype, its shape and some of its values, spread over all of it."""
    flat = x.detach().reshape(-1)
    at = torch.linspace(0, max(flat.numel() - 1, 0), _SAMPLED, dtype=torch.float64).long()[: flat.numel()]
    values = flat[at.to(flat.device)].to("cpu", torch.float64).numpy().tobytes()
    head = f"{x.dtype} {tuple(x.shape)} ".encode()
    return hashlib.sha256(head + values).hexdigest()[:16]


def parameters_of(gm: fx.GraphModule, inputs: Sequence[Any]) -> list[torch.nn.Parameter]:
    """The parameters of a graph: inputs, and attributes of its module where they were not lifted."""
    own = [x for x in inputs if isinstance(x, torch.nn.Parameter)]
    return [*own, *(p for p in gm.parameters() if all(p is not x for x in own))]
