"""`attncc.explain`: run the compiler on a model and say what became of every attention."""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch

from attncc import torch_private
from attncc.driver.backend import Collected, attncc_backend, collecting
from attncc.ir import print_program
from attncc.report.model import Report


def explain(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """Compile `model` for these arguments, run it once, and report on each softmax-like site.

    The model runs as it is: in its own train or eval mode, with gradients if they are on. Raises what it raises."""
    found = Collected()
    token = collecting.set(found)
    torch._dynamo.reset()
    torch_private.trace_through_sdp_kernel()
    before = torch_private.graph_breaks()
    try:
        compiled = torch.compile(model, backend=attncc_backend, options={"inductor": False})
        compiled(*args, **kwargs)
    finally:
        collecting.reset(token)
        torch._dynamo.reset()
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
        versions={"attncc": version("attncc"), "torch": torch.__version__, "python": platform.python_version()},
    )
