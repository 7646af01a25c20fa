"""The `torch.compile` backend: read, lift, decide, edit, and hand the rest to Inductor."""

from __future__ import annotations

import copy
import gc
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

from torch import fx

from attncc import torch_private
from attncc.driver import capture, describe
from attncc.driver.edit import EditError, Editor, source_text
from attncc.driver.merge import merge
from attncc.driver.plain import plain
from attncc.driver.selection import Candidate, Choice, decide
from attncc.driver.site_groups import Joint, together
from attncc.ir import Attention, print_attention, print_linear
from attncc.ir.expr import Expr, Size
from attncc.kernels.build import build_all, built, optimise
from attncc.passes.rewrites.split_axes import split_axes
from attncc.patterns.graph.facts import Facts
from attncc.patterns.lift import Refusal, lift_all
from attncc.patterns.linear.linear import Recognised
from attncc.patterns.refusals.reasons import used_by
from attncc.patterns.site.assemble import Lifted
from attncc.progress import step, waiting
from attncc.report.model import Site


@dataclass
class Collected:
    """What compilations inside an `explain` found."""

    sites: list[Site] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


collecting: ContextVar[Collected | None] = ContextVar("attncc_collecting", default=None)
_said: set[str] = set()

if "torch._dynamo" in sys.modules:  # as where a backend is looked up by its name; importing attncc alone stays light
    torch_private.trace_through_sdp_kernel()


def attncc_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph: attention by attncc, everything else by Inductor.

    `mode` is a `torch.compile` mode of Inductor. `options` are Inductor's configuration entries, `inductor=False` to
    run the edited graph as it is, and `measure=False` to fuse every site without measuring it against the model's own
    operations. Raises RuntimeError for an unknown mode or option."""
    own = dict(options or {})
    use_inductor, measure = own.pop("inductor", True), own.pop("measure", True)
    config = {**torch_private.mode_options(mode), **own}
    found = collecting.get() or Collected()
    torch_private.trace_through_sdp_kernel()  # for the frames to come, where it was not looked up by its name
    attends = not plain(gm)
    if attends:
        torch_private.ask_for_known_floats(gm)
    with waiting():
        if attends:
            gm = rewrite(gm, example_inputs, found, measure=measure)
        for note in found.notes:
            _say_once(note)
        if not use_inductor:
            return gm.forward
        step("compiling the rest with Inductor")
        try:
            return torch_private.inductor(gm, example_inputs, config)
        except Exception as error:
            if not torch_private.lacks_compiler(error):
                raise
            _say_once("no C++ compiler found (set CXX, or install g++ or clang++); the model runs uncompiled")
            return gm.forward


def rewrite(gm: fx.GraphModule, inputs: Sequence[Any], found: Collected, *, measure: bool = True) -> fx.GraphModule:
    """The graph with its attention fused where that is right, and a record of every site in `found`.

    Nothing that goes wrong here costs the user the model: the graph is then compiled as it came, with a note."""
    try:
        step("reading the graph")
        with _no_collection():
            reading = capture.read(gm, inputs)
        for body, arguments in reading.bodies:
            rewrite(body, arguments, found, measure=measure)
        with _no_collection():
            step("finding attention")
            facts = reading.facts()
            lifted = lift_all(facts)
        if not lifted:
            return gm
    except Exception as error:
        found.notes.append(f"a graph could not be read, Inductor compiles it as it is: {_line(error)}")
        return gm
    untouched = copy.deepcopy(gm.graph)  # new nodes, the same metadata: the edit is in place
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
    if collecting.get() is not None:
        found.before.append(source_text(untouched))
        found.after.append(source_text(result.graph))
    return result


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without the garbage collector: one pass over all that Dynamo holds takes as long as the work itself."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _edited(
    reading: capture.Reading, facts: Facts, lifted: list[Lifted | Refusal | Recognised], settled: list[Site],
    first: int, measure: bool,
) -> fx.GraphModule:
    """Every site decided, in order, and the graph edited. `settled` grows as it goes."""
    joints = {id(site): joint for joint in together([s for s in lifted if isinstance(s, Lifted)], facts)
              for site in joint.sites}  # fmt: skip
    plans = [_plan(site, joints[id(site)], facts) if isinstance(site, Lifted) else None for site in lifted]
    planned = {id(site): plan for site, plan in zip(lifted, plans, strict=True)}
    step("building kernels")
    build_all((p.spec, p.device) for p in plans if isinstance(p, Plan))
    step("editing the graph")
    editor = Editor(reading, facts)
    verdicts: dict[fx.Node, Choice] = {}
    said: set[fx.Node] = set()
    for site, plan in zip(lifted, plans, strict=True):
        index = first + len(settled)
        place = reading.origin.get(site.anchor) or reading.owner[site.anchor]
        where, path = describe.user_line(place), describe.module_path(place)
        if isinstance(site, Refusal):
            at = reading.origin.get(site.node) or reading.owner.get(site.node)
            settled.append(Site(index, "refused", site.reason, path, (describe.user_line(at) if at else "") or where))
            continue
        if isinstance(site, Recognised):
            text = print_linear(site.linear)
            equation = describe.linear_equation(site.linear)
            settled.append(Site(index, "kept", site.reason, path, where, equation, became="original graph", ir=text))
            continue
        assert plan is not None  # every lifted site has one
        if site.node not in verdicts:
            verdicts |= _settled(joints[id(site)], planned, facts, editor, measure)
        if isinstance(plan, fx.Node) and site.anchor in said:
            continue  # a softmax whose weights go to several products, and must exist
        said.add(site.anchor)
        settled.append(_record(site, plan, verdicts[site.node], Place(index, path, where), facts))
    return editor.finish()


def _settled(
    joint: Joint, plans: Mapping[int, Plan | fx.Node | None], facts: Facts, editor: Editor, measure: bool
) -> dict[fx.Node, Choice]:
    """What becomes of each node that sites which are decided together take the place of; those chosen are fused."""
    pairs = [(site, plan) for site in joint.sites if isinstance(plan := plans[id(site)], Plan)]
    nodes = dict.fromkeys(site.node for site in joint.sites)
    verdict = _verdict(joint, [plan for _, plan in pairs], facts, measure)
    step("editing the graph")
    found = dict.fromkeys(nodes, verdict)
    places = dict.fromkeys(_target(site) for site, _ in pairs)
    for place in places if verdict.fused else ():
        parts = [(site, plan.final) for site, plan in pairs if _target(site) is place]
        try:
            (editor.fuse if parts[0][0].piece is None else partial(merge, editor))(parts)
        except EditError as error:
            found |= dict.fromkeys((site.node for site, _ in parts), replace(verdict, fused=False, reason=str(error)))
    return found


def _target(site: Lifted) -> fx.Node:
    """What sites that are put into the graph together have in common."""
    return site.node if site.piece is None else site.piece.anchor


@dataclass(frozen=True)
class Plan:
    """What a site would become: the attention after the passes, its text, and the device it runs on."""

    final: Attention
    spec: str
    device: str


@dataclass(frozen=True)
class Place:
    index: int
    path: str
    where: str


def _plan(site: Lifted, joint: Joint, facts: Facts) -> Plan | fx.Node:
    """The plan, or who needs the weights outside: then the scores exist anyway and nothing is to be gained."""
    if joint.user is not None:
        return joint.user
    return _planned(site.attention, tuple(site.factors.items()), facts.value(site.node).device.type)


@lru_cache(maxsize=256)
def _planned(a: Attention, factors: tuple[tuple[Size, Expr], ...], device: str) -> Plan:
    """Sites that compute the same share one plan, so what it costs does not grow with the layers."""
    final = optimise(split_axes(a, dict(factors)))
    return Plan(final, print_attention(final), device)


def _verdict(joint: Joint, plans: Sequence[Plan], facts: Facts, measure: bool) -> Choice:
    if joint.user is not None:
        name = used_by(facts, joint.user)
        return Choice(False, None, f"its scores or weights are used elsewhere too, by {name}, and so must exist")
    kernels = [built(plan.spec, plan.device) for plan in plans]
    slow = next((made for made in kernels if made.language == "torch"), None)
    if slow is not None:
        return Choice(False, None, slow.reason)
    if not measure:
        return Choice(True, None, "not measured")
    parts = [Candidate(s, p.final, p.spec, made) for s, p, made in zip(joint.sites, plans, kernels, strict=True)]
    return decide(parts, facts)


def _record(site: Lifted, plan: Plan | fx.Node, verdict: Choice, place: Place, facts: Facts) -> Site:
    shown = optimise(site.attention)
    made = built(plan.spec, plan.device) if isinstance(plan, Plan) else None
    sizes = None if collecting.get() is None else describe.sizes_of(site, facts)
    area, picture = (None, None) if sizes is None else describe.extent_of(shown, sizes)
    area = area if made is None else made.area(area)
    return Site(
        place.index, "fused" if verdict.fused else "kept", verdict.reason, place.path, place.where,
        describe.equation(shown), describe.mask(shown), describe.shapes(site),
        visible=None if area is None else area.visible, visited=None if area is None else area.visited,
        total=None if area is None else area.total,
        became=made.shown if made is not None and verdict.fused else "original graph", speedup=verdict.speedup,
        ir=plan.spec if isinstance(plan, Plan) else print_attention(shown),
        kernel=None if made is None else made.source, language=None if made is None else made.language,
        picture=picture, sizes=sizes,
    )  # fmt: skip


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _say_once(note: str) -> None:
    if note not in _said:
        _said.add(note)
        warnings.warn(f"attncc: {note}", stacklevel=3)
