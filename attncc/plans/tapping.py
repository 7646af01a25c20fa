"""The dense run that profiling looks into: each attention of a model shows its tensors, its output and the gradient of
that to whoever profiles, one site at a time, so that no more than one site's candidates exist at once.

    forward    O = attention(q, k, v, ..), by the exact kernel
    backward   g = d<u, f(x)> / dO goes on unchanged, and is shown beside O and the tensors
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import fx, nn

from attncc.driver.backend import attncc_backend, compile_graph
from attncc.driver.options import Options
from attncc.driver.planning import PlannedSite, fingerprint, planned_program
from attncc.driver.running import run, up_to_attention
from attncc.ir import Attention, Expr, Program
from attncc.ir.evaluate import int_value
from attncc.ir.reasons import Reason
from attncc.passes.pipeline import standard
from attncc.passes.policies.hiding import Form
from attncc.passes.policies.places import head_count
from attncc.plans.plan import Key
from attncc.report.site import HeadForm
from attncc.runtime.outputs import signature_of
from attncc.torch_private.compiling import compiled_apart, trace_through_breaks


@dataclass(frozen=True)
class Seen:
    """One call of an attention: `program` computes it from `values`, tensors by name, at `sizes`; `keys` is how many
    keys it has."""

    site: PlannedSite
    program: Program
    values: Mapping[str, torch.Tensor]
    sizes: Mapping[Expr, int]
    keys: int

    @property
    def key(self) -> Key:
        return self.site.key

    def by_head(self, x: torch.Tensor) -> torch.Tensor:
        """An output of the attention, or the like of one, as (batch, heads, rows, components)."""
        return x.reshape(-1, head_count(self.site.attention), *x.shape[-2:])


class Watcher(Protocol):
    """Who is shown the calls."""

    def form(self, seen: Seen) -> Program | None:
        """What computes the call, before it runs and where no gradient is wanted; None for the exact kernel."""
        ...

    def gave(self, seen: Seen, out: torch.Tensor) -> None:
        """Sees the output of a call in the form that it gave, as the program lays it out."""
        ...

    def backward(self, seen: Seen, out: torch.Tensor, gradient: torch.Tensor) -> None:
        """Sees the output of a call and its gradient, both as the attention lays them out."""
        ...


@dataclass
class Tapped:
    """A planner under which every attention runs exact and is shown. `sites` are those met, `weights` the fingerprints
    of the parameters of their graphs, `passed_over` the attentions that no plan can speak of."""

    watcher: Watcher
    sites: dict[Key, PlannedSite] = field(default_factory=dict)
    weights: dict[str, None] = field(default_factory=dict)
    passed_over: int = 0
    notes: list[str] = field(default_factory=list)
    _calls: list[tuple[fx.Node, PlannedSite, Program, Program]] = field(default_factory=list)

    compiler_fn = staticmethod(attncc_backend)

    def begin(self, parameters: Sequence[nn.Parameter]) -> None:
        self.weights |= dict.fromkeys(map(fingerprint, parameters))

    def take(self, site: PlannedSite, p: Program) -> Program | Reason | None:
        return None

    def timed(self, site: PlannedSite) -> bool:
        return True

    def says(self, site: PlannedSite) -> str:
        return ""

    def forms(self, site: PlannedSite) -> tuple[HeadForm, ...]:
        return ()

    def made(self, site: PlannedSite, taken: Program, final: Program, call: fx.Node) -> None:
        self._calls.append((call, site, taken, final))

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """The backend of the run: the edited graph, not compiled further, whose attentions are shown."""
        self._calls.clear()
        compile_graph(gm, inputs, Options(inductor=False, measure=False), self)
        there = {*gm.graph.nodes}
        for call, site, taken, final in self._calls:
            if call not in there:
                continue  # an edit that was taken back
            shown = _shown(site, taken, final, self.watcher)
            if shown is None:
                self.passed_over += 1
                continue
            self.sites.setdefault(site.key, site)
            call.target = shown
        gm.recompile()
        return gm.forward


@contextmanager
def tapped(watcher: Watcher) -> Iterator[tuple[Tapped, Callable[[Any], Any]]]:
    """The planner, which fills as models run, and a function that puts a model under its taps. What is compiled already
    stays compiled, and what is compiled here is gone afterwards."""
    planner = Tapped(watcher)
    trace_through_breaks(attncc_backend)
    with compiled_apart(planner) as compiled:
        yield planner, compiled


def _shown(site: PlannedSite, taken: Program, final: Program, watcher: Watcher) -> Callable[..., Any] | None:
    """The operator, but that its calls are shown; None where it is not a program's only attention."""
    places = [n for n, step in enumerate(final.steps) if isinstance(step.node, Attention)]
    if len(places) != 1:
        return None
    program, step = up_to_attention(taken), final.steps[places[0]]
    if not {t.name for t in program.inputs} <= {*step.arguments}:
        return None
    own = program.steps[-1]

    def attend(tensors: Sequence[torch.Tensor], sizes: Sequence[int], spec: str) -> list[torch.Tensor]:
        values = {name: t.detach() for name, t in zip(step.arguments, tensors, strict=True)}
        known: dict[Expr, int] = dict(zip(step.sizes, sizes, strict=True))
        table: dict[Expr, int] = dict(zip(own.node.sizes, (int_value(x, known) for x in own.sizes), strict=True))
        seen = Seen(site, program, values, known, int_value(site.attention.j.extent, table))
        form = None if torch.is_grad_enabled() else watcher.form(seen)
        if form is not None:
            (out,) = run(form, values, known)
            watcher.gave(seen, out)
            shape = signature_of(spec).allocate(tensors, sizes)
            return [out.view_as(shape[0]), *shape[1:]]
        out, *others = torch.ops.attncc.attention(tensors, sizes, spec)
        if torch.is_grad_enabled():  # the first attention of a model whose parameters learn nothing begins a graph
            out = out if out.requires_grad else out.detach().requires_grad_()
            out = _Shown.apply(out, seen, watcher)
        return [out, *others]

    return attend


class _Shown(torch.autograd.Function):
    """The identity, whose backward shows the gradient."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, seen: Seen, watcher: Watcher) -> torch.Tensor:
        ctx.seen, ctx.watcher = seen, watcher
        ctx.save_for_backward(out)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        ctx.watcher.backward(ctx.seen, *ctx.saved_tensors, gradient)
        return gradient, None, None


@lru_cache(maxsize=4096)
def in_forms(program: Program, forms: tuple[Form, ...]) -> Program | Reason:
    """The program of an attention in some forms, after the passes; the reason where one means nothing there."""
    hidden = planned_program(program, forms)
    return hidden if isinstance(hidden, Reason) else standard().run(hidden)
