"""The `torch.compile` backend: fuse a graph's attention, and hand the rest to Inductor."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import fx

from attncc import torch_private
from attncc.driver.collected import Collected, collecting
from attncc.driver.graph_edits import GraphEdits
from attncc.driver.known_edits import edit_again, known, remember
from attncc.driver.options import Options, options_of
from attncc.driver.plain import plain
from attncc.driver.ran import Ran
from attncc.driver.sign_bits import may_write, signed_inputs, with_their_numbers
from attncc.errors import log, unforeseen
from attncc.ir.reasons import because
from attncc.progress import step, waiting
from attncc.runtime import notices
from attncc.runtime.recent import Recent
from attncc.torch_private import floats
from attncc.torch_private.compiling import trace_through_breaks
from attncc.torch_private.distributed import is_distributed

if TYPE_CHECKING:
    from attncc.driver.planning import Planner

__all__ = ["Collected", "attncc_backend", "collecting", "rewrite"]

_said = Recent[str, None](256)


def attncc_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph: attention by attncc, everything else by Inductor.

    `mode` is a `torch.compile` mode of Inductor. `options` are Inductor's configuration entries, `inductor=False` to
    run the edited graph as it is, `measure=False` to fuse every site without measuring it against the model's own
    operations, `plan` to run approximate forms: a plan (`attncc.profile`) or the path of its file, and `guard=True` to
    compute some rows of each such call exactly, and all of it where they differ too much. Raises RuntimeError for an
    unknown mode or option, PlanError (which is one) for a plan of another model."""
    chosen = options_of(mode, options)
    planner = None
    if chosen.plan is not None:
        from attncc.driver.planning import Following  # noqa: PLC0415 - for plans alone

        planner = Following(chosen.plan, guard=chosen.guard)
    return compile_graph(gm, example_inputs, chosen, planner)


def compile_graph(
    gm: fx.GraphModule, example_inputs: Sequence[Any], chosen: Options, planner: Planner | None = None
) -> Callable[..., Any]:
    """Compile a Dynamo graph, its attentions in the forms that `planner` gives them."""
    trace_through_breaks(attncc_backend)  # for the frames to come, where this was not asked for by its name
    found, edits = Collected(), GraphEdits()
    if any(is_distributed(x) for x in example_inputs):
        from attncc.runtime import sharding  # noqa: PLC0415 - for distributed tensors alone

        sharding.install()
    signed = signed_inputs(example_inputs) if chosen.inductor else ()
    if signed and may_write(gm.graph):
        _say_once("a graph that writes to a conjugate's view runs uncompiled: Inductor does not see its sign")
        return gm.forward
    with waiting():
        if torch_private.are_fake(example_inputs):
            found.notes.append("a model that is called with fake tensors is compiled as it is: nothing can be timed")
        elif not plain(gm):
            floats.ask_for_known_floats(gm)
            graph = known(gm, example_inputs, measure=chosen.measure) if planner is None else None
            if graph is None or not edit_again(gm, graph, found, edits):
                rewrite(gm, example_inputs, found, edits, measure=chosen.measure, planner=planner)
                if graph is not None:
                    remember(gm, graph, found, edits)
        compiled = _compiled(gm, example_inputs, chosen.config, found, edits) if chosen.inductor else gm.forward
    found.notes += notices.taken()
    found.notes += [] if planner is None else planner.notes
    floats.forget_asked_floats()
    for note in found.notes:
        _say_once(note)
    for site in found.sites:
        log.info("%s %s", site, site.reason)
    if found.sites:
        torch_private.artifact("attncc_sites", lambda: _recording().artifact_of(found))
    outer = collecting.get()
    if outer is not None:
        outer.add(found)
    run = with_their_numbers(compiled, signed) if signed else compiled
    return Ran(run, found, outer is not None) if found.sites else run


def rewrite(gm: fx.GraphModule, inputs: Sequence[Any], found: Collected, *more: Any, **named: Any) -> fx.GraphModule:
    """Fuse a graph's attention: `attncc.driver.rewriting.rewrite`. What reads and lifts takes as long to import as all
    the rest, and a graph that is known needs none of it."""
    try:
        rewriting = _rewriting()
    except Exception as error:
        reason = unforeseen("loading what reads graphs", error)
        found.notes.append(f"a graph could not be read, Inductor compiles it as it is: {reason}")
        return gm
    return rewriting.rewrite(gm, inputs, found, *more, **named)


def _rewriting() -> Any:
    return import_module("attncc.driver.rewriting")


def _recording() -> Any:
    return import_module("attncc.driver.recording")


def _compiled(
    gm: fx.GraphModule, inputs: Sequence[Any], config: dict[str, Any], found: Collected, edits: GraphEdits
) -> Callable[..., Any]:
    """A graph compiled by Inductor, without the edits if it fails with them; as it is where there is no compiler."""
    step("compiling the rest with Inductor")
    try:
        try:
            return torch_private.inductor(gm, inputs, config, _say_once)
        except Exception as error:
            if not edits or torch_private.restarts(error) or torch_private.lacks_compiler(error):
                raise
            reason = because("compiling-failed", unforeseen("compiling a fused graph", error))
            edits.undo()
            found.notes.append(f"a graph is compiled as it came; {reason}")
            found.sites = [_rewriting().left_alone(site, reason) for site in found.sites]
        return torch_private.inductor(gm, inputs, config, _say_once)
    except Exception as error:
        if not torch_private.lacks_compiler(error):
            raise
        found.notes.append("no C++ compiler found (set CXX, or install g++ or clang++); the model runs uncompiled")
        return gm.forward


def _say_once(note: str) -> None:
    if note not in _said:
        _said[note] = None
        log.warning("%s", note)
        warnings.warn(f"attncc: {note}", stacklevel=3)
