"""`attncc.explain`: run the compiler on a model and say what became of every attention."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from attncc import torch_private
from attncc.driver.backend import Collected, attncc_backend, collecting
from attncc.errors import unforeseen
from attncc.ir import print_program
from attncc.kernels.visited import visited
from attncc.report.model import Report, Site
from attncc.torch_private.compiling import compiled_apart, trace_through_breaks
from attncc.version import __version__


class _Explaining:
    """The backend of one explanation, which runs the edited graph as it is. No other compilation finds its results."""

    compiler_fn = staticmethod(attncc_backend)

    def __init__(self, found: Collected, plan: object = None) -> None:
        self.graphs, self.found, self.plan = 0, found, plan

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs += 1
        first = len(self.found.sites)
        run = attncc_backend(gm, inputs, options={"inductor": False, "plan": self.plan})
        open_ = [n for n in range(first, len(self.found.sites)) if _by_data(self.found.sites[n])]
        return _Counting(gm, self.found.sites, open_) if open_ and run == gm.forward else run


def _by_data(site: Site) -> bool:
    """Whether only a call tells what the kernel of a site visits."""
    return site.status == "fused" and site.visible is None


class _Counting:
    """A graph whose first call counts what the kernels of some sites visit; these are the calls of their specs, in
    order."""

    def __init__(self, gm: fx.GraphModule, sites: list[Site], numbers: Sequence[int]) -> None:
        self.gm, self.sites = gm, sites
        self.left: dict[str, list[int]] = {}
        for n in numbers:
            self.left.setdefault(sites[n].ir or "", []).append(n)

    def __call__(self, *args: Any) -> Any:
        if not self.left:
            return self.gm.forward(*args)
        counting = self

        class Run(fx.Interpreter):
            def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
                if target is torch.ops.attncc.attention.default:
                    counting.count(*args)
                return super().call_function(target, args, kwargs)

        try:
            return Run(self.gm).run(*args)
        finally:
            self.left.clear()

    def count(self, tensors: Sequence[torch.Tensor], sizes: Sequence[int], spec: str) -> None:
        waiting = self.left.get(spec)
        if not waiting:
            return
        n = waiting.pop(0)
        try:
            with torch.no_grad():
                own = [t.detach() for t in tensors]
                found = visited(spec, own, [int(x) for x in sizes])
        except Exception as error:  # a report that says less is no reason for a model not to run
            unforeseen("counting what a kernel visits", error)
            return
        self.sites[n] = replace(self.sites[n], visible=found.visible, visited=found.visited, total=found.total)


def explain(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """Compile `model` for these arguments, run it once, and report on each softmax-like site.

    The model runs as it is: in its own train or eval mode, with gradients if they are on. Raises what it raises. What
    is compiled already, of this model too, stays compiled."""
    return explain_plan(None, model, *args, **kwargs)


def explain_plan(plan: Any, model: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """`explain` for a model that follows a plan, or the path of its file. Where the plan is for another model, Dynamo's
    own error is raised, which holds a PlanError."""
    found = Collected()
    backend = _Explaining(found, plan)
    token = collecting.set(found)
    trace_through_breaks(attncc_backend)
    before = torch_private.graph_breaks()
    try:
        with compiled_apart(backend) as compiled:
            compiled(model)(*args, **kwargs)
    finally:
        collecting.reset(token)
    if not backend.graphs:
        found.notes.append("Dynamo compiled nothing: the model ran as it is, and its attention is not seen")
    for reason, count in (torch_private.graph_breaks() - before).items():
        times = "" if count == 1 else f", {count} times"
        found.notes.append(f"a graph break{times}: {reason}; attention that runs outside the graphs is not seen")
    return report(found)


def explain_program(program: torch.export.ExportedProgram, *args: Any, **kwargs: Any) -> Report:
    """`explain` for an exported program, on its own example inputs where none are given.

    Raises ValueError if there are none either."""
    if not args and not kwargs:
        if program.example_inputs is None:
            raise ValueError("the exported program carries no example inputs: pass some")
        args, kwargs = program.example_inputs
    return explain(program.module(), *args, **kwargs)


def report(found: Collected) -> Report:
    return Report(
        sites=tuple(found.sites),
        graph_before="\n\n".join(found.before),
        graph_after="\n\n".join(found.after),
        notes=tuple(dict.fromkeys(found.notes)),
        stages=tuple((stage.made_by.name, print_program(stage.after)) for stage in found.stages),
        versions={"attncc": __version__, "torch": torch.__version__, "python": platform.python_version()},
    )
