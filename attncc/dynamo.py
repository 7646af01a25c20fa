"""The `torch.compile` backend: read, lift, decide, edit, and hand the rest to Inductor."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from attncc import capture, sites, torch_private
from attncc.choice import Choice, decide
from attncc.codegen import torch_form
from attncc.edit import EditError, Editor, source_text
from attncc.ir import Attention, print_attention
from attncc.kernels import Built, build, built, optimise
from attncc.passes.split_axes import split_axes
from attncc.patterns.assemble import Lifted
from attncc.patterns.facts import Facts
from attncc.patterns.lift import Refusal, lift_all
from attncc.progress import step
from attncc.report import Site
from attncc.runtime import op

@dataclass
class Collected:
    """What compilations inside an `explain` found."""

    sites: list[Site] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


collecting: ContextVar[Collected | None] = ContextVar("attncc_collecting", default=None)
_said: set[str] = set()

op.install(build, torch_form.run_blocked)


def attncc_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph: attention by attncc, everything else by Inductor.

    `mode` is a `torch.compile` mode of Inductor. `options` are Inductor's configuration entries, `inductor=False` to run
    the edited graph as it is, and `measure=False` to fuse every site without measuring it against the model's own
    operations. Raises RuntimeError for an unknown mode or option."""
    own = dict(options or {})
    use_inductor, measure = own.pop("inductor", True), own.pop("measure", True)
    config = {**torch_private.mode_options(mode), **own}
    found = collecting.get() or Collected()
    gm = rewrite(gm, example_inputs, found, measure=measure)
    for note in found.notes:
        _say_once(note)
    if not use_inductor:
        return gm.forward
    step("compiling the rest with Inductor")
    return torch_private.inductor(gm, example_inputs, config)


def rewrite(gm: fx.GraphModule, inputs: Sequence[Any], found: Collected, *, measure: bool = True) -> fx.GraphModule:
    """The graph with its attention fused where that is right, and a record of every site in `found`.

    Nothing that goes wrong here costs the user the model: the graph is then compiled as it came, with a note."""
    try:
        step("reading the graph")
        reading = capture.read(gm, inputs)
        for body, arguments in reading.bodies:
            rewrite(body, arguments, found, measure=measure)
        facts = reading.facts()
        lifted = lift_all(facts)
        if not lifted:
            return gm
    except Exception as error:
        found.notes.append(f"a graph could not be read, Inductor compiles it as it is: {_line(error)}")
        return gm
    untouched = copy.copy(gm.graph)  # node by node: the edit is in place
    settled: list[Site] = []
    try:
        result = _edited(reading, facts, lifted, settled, len(found.sites), measure)
    except Exception as error:
        gm.graph = untouched
        reason = f"editing the graph failed: {_line(error)}"
        found.notes.append(f"a graph is compiled as it is; {reason}")
        found.sites += [s if s.status == "refused" else replace(s, status="kept", reason=reason) for s in settled]
        return gm
    found.sites += settled
    found.before.append(source_text(untouched))
    found.after.append(source_text(result.graph))
    return result


def _edited(
    reading: capture.Reading, facts: Facts, lifted: list[Lifted | Refusal], settled: list[Site], first: int, measure: bool
) -> fx.GraphModule:
    """Every site decided, in order, and the graph edited. `settled` grows as it goes."""
    editor = Editor(reading, facts)
    taken: set[fx.Node] = set()
    for index, site in enumerate(lifted, first):
        place = reading.origin.get(site.anchor) or reading.owner[site.anchor]
        where, path = sites.user_line(place), sites.module_path(place)
        if isinstance(site, Lifted) and site.node in taken:
            site = Refusal("its product with the values belongs to another site too", site.node, site.anchor)
        if isinstance(site, Refusal):
            at = reading.origin.get(site.node) or reading.owner.get(site.node)
            settled.append(Site(index, "refused", site.reason, path, (sites.user_line(at) if at else "") or where))
            continue
        taken.add(site.node)
        settled.append(_settle(site, editor, facts, index, path, where, measure))
    return editor.finish()


def _settle(
    site: Lifted, editor: Editor, facts: Facts, index: int, path: str, where: str, measure: bool
) -> Site:
    """Fuse a site or keep it, and say which and why."""
    a = site.attention

    def record(
        status: Any, reason: str, made: Built | None = None, final: Attention | None = None, ratio: float | None = None
    ) -> Site:
        return Site(
            index, status, reason, path, where, sites.equation(optimise(a)), sites.mask(optimise(a)), sites.shapes(site),
            became=made.name if made is not None and status == "fused" else "original graph",
            speedup=ratio, ir=print_attention(a if final is None else final),
            kernel=None if made is None else made.source, language=None if made is None else made.language,
        )  # fmt: skip

    if site.escapes:
        return record("kept", f"its weights are used elsewhere too, by {site.escapes[0].name}, and so must exist")
    final = optimise(split_axes(a, site.factors))
    device = facts.value(site.node).device.type
    made = built(print_attention(final), device)
    if made.language == "torch":
        return record("kept", made.reason, made, final)
    choice = decide(site, final, made, facts) if measure else Choice(True, None, "not measured")
    if not choice.fused:
        return record("kept", choice.reason, made, final, choice.speedup)
    try:
        editor.fuse(site, final)
    except EditError as error:
        return record("kept", str(error), made, final)
    return record("fused", choice.reason, made, final, choice.speedup)


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _say_once(note: str) -> None:
    if note not in _said:
        _said.add(note)
        warnings.warn(f"attncc: {note}", stacklevel=3)


def versions() -> dict[str, str]:
    return {"torch": torch.__version__}
