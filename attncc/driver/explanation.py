"""`attncc.explain`: run the compiler on a model and say what became of every attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from attncc.driver.backend import attncc_backend
from attncc.driver.recording import record
from attncc.report.model import Report
from attncc.torch_private.compiling import compiled_apart, trace_through_breaks


class _Explaining:
    """The backend of one explanation, which runs the edited graph as it is. No other compilation finds its results."""

    compiler_fn = staticmethod(attncc_backend)

    def __init__(self, plan: object = None) -> None:
        self.graphs, self.plan = 0, plan

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs += 1
        return attncc_backend(gm, inputs, options={"inductor": False, "plan": self.plan})


def explain(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """Compile `model` for these arguments, run it once, and report on each softmax-like site.

    The model runs as it is: in its own train or eval mode, with gradients if they are on. Raises what it raises. What
    is compiled already, of this model too, stays compiled; to report on that, see `attncc.record`."""
    return explain_plan(None, model, *args, **kwargs)


def explain_plan(plan: Any, model: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """`explain` for a model that follows a plan, or the path of its file. Where the plan is for another model, Dynamo's
    own error is raised, which holds a PlanError."""
    backend = _Explaining(plan)
    trace_through_breaks(attncc_backend)
    with record() as recording, compiled_apart(backend) as compiled:
        compiled(model)(*args, **kwargs)
    if not backend.graphs:
        recording.note("Dynamo compiled nothing: the model ran as it is, and its attention is not seen")
    return recording.report


def explain_program(program: torch.export.ExportedProgram, *args: Any, **kwargs: Any) -> Report:
    """`explain` for an exported program, on its own example inputs where none are given.

    Raises ValueError if there are none either."""
    if not args and not kwargs:
        if program.example_inputs is None:
            raise ValueError("the exported program carries no example inputs: pass some")
        args, kwargs = program.example_inputs
    return explain(program.module(), *args, **kwargs)

