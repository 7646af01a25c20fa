"""From a Dynamo graph to the same graph with its attention fused: read, lift, decide, edit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

from torch import fx

from attncc.driver import capture, describe, dropout, linear_sites
from attncc.driver.candidate import Candidate, Choice, unmeasured
from attncc.driver.collected import Collected, collecting
from attncc.driver.edit import Editor, source_text
from attncc.driver.garbage import no_collection
from attncc.driver.graph_edits import GraphEdits, copied
from attncc.driver.names import names_of, readable
from attncc.driver.planned_times import slower
from attncc.driver.planning import Places, PlannedSite, Planner, parameters_of
from attncc.driver.selection import decide
from attncc.driver.site_groups import SiteGroup, together
from attncc.driver.site_record import Place, Proposal, recorded
from attncc.driver.surroundings import around
from attncc.driver.training import Training, runs_again, training_of
from attncc.errors import EditError, PlanError, unforeseen
from attncc.ir import Attention, Program, print_attention, print_linear
from attncc.ir.expr import Expr, Size
from attncc.ir.reasons import Reason, because
from attncc.kernels.build import build_all, built
from attncc.kernels.gradients import builds_of
from attncc.passes.pipeline import Stage, standard
from attncc.passes.rewrites.row_sums import with_sums
from attncc.patterns.graph.facts import Facts
from attncc.patterns.lift import Refusal, lift_all
from attncc.patterns.linear.linear import Recognised
from attncc.patterns.refusals.reasons import used_by
from attncc.patterns.site.assemble import Lifted
from attncc.patterns.site.beside import joined
from attncc.patterns.site.program import SiteProgram, program_of
from attncc.progress import step
from attncc.report.site import GraphNode, Site
from attncc.torch_private.state import preserved, under, without_autocast


def rewrite(
    gm: fx.GraphModule, inputs: Sequence[Any], found: Collected, edits: GraphEdits | None = None, *,
    measure: bool = True, recomputed: bool = False, planner: Planner | None = None, kernels: bool = True,
    inner: bool = False,
) -> fx.GraphModule:  # fmt: skip
    """Fuse a graph's attention where that is right, and record every site in `found` and what was replaced in `edits`.
    `recomputed`: backward runs the graph once more. `planner` gives attentions another form. Without `kernels` every
    site is fused and none is built: who asks for that gives the operator's calls another form. `inner`: an operator of
    another graph runs this one.

    Nothing that goes wrong here costs the user the model: the graph then stays as it came, with a note. Raises
    PlanError where the plan is for another model."""
    edits = GraphEdits() if edits is None else edits
    way, drops = Way(measure, planner, kernels, inner), 0
    found.planned |= planner is not None
    try:
        if capture.has_nested(gm):
            found.notes.append("a graph over nested tensors is left as it is: torch's own kernels compute attention")
            return gm
        with preserved():
            drops = dropout.spell_out(gm, edits)
            reading = _read(gm, inputs, found, edits, way, recomputed)
            with no_collection(), without_autocast():
                step("finding attention")
                facts = reading.facts()
                lifted = _with_columns(lift_all(facts), facts)
            if lifted:
                if planner is not None:
                    planner.begin(parameters_of(gm, inputs))
                _fuse(gm, reading, facts, lifted, found, edits, way, training_of(reading, recomputed=recomputed))
    except PlanError:
        raise
    except Exception as error:
        reason = unforeseen("reading a graph", error)
        found.notes.append(f"a graph could not be read, Inductor compiles it as it is: {reason}")
    finally:
        if drops > (left := _undropped(gm, found)):
            found.notes.append(dropout.OWN_STREAM.format(drops - left))
    return gm


def _undropped(gm: fx.GraphModule, found: Collected) -> int:
    """Dropouts that no kernel took as they came; how many. One that stays in our spelling computes the same."""
    left = 0
    try:
        left = dropout.put_back(gm.graph)
    except Exception as error:
        reason = unforeseen("putting back dropout", error)
        found.notes.append(f"dropouts of attention weights may draw from a stream of their own: {reason}")
    if left:
        gm.recompile()
    return left


def _read(
    gm: fx.GraphModule, inputs: Sequence[Any], found: Collected, edits: GraphEdits, way: Way, recomputed: bool
) -> capture.Reading:
    """The shadow of a graph. The bodies in it, which have graphs of their own, are rewritten."""
    step("reading the graph")
    with no_collection():
        reading = capture.read(gm, inputs)
    for body in reading.bodies:
        with under(body.modes):
            again = recomputed or runs_again(gm, body.module)
            rewrite(
                body.module, body.arguments, found, edits, measure=way.measure, recomputed=again, planner=way.planner,
                kernels=way.kernels, inner=True,
            )  # fmt: skip
    return reading


def _with_columns(
    found: list[Lifted | Refusal | Recognised], facts: Facts
) -> list[Lifted | Refusal | Recognised]:  # fmt: skip
    """The sites, those that weigh several values with one softmax as one."""
    taken = joined([x for x in found if isinstance(x, Lifted)], facts)
    kept = (taken.get(id(x), x) if isinstance(x, Lifted) else x for x in found)
    return [x for x in kept if x is not None]


def _fuse(
    gm: fx.GraphModule, reading: capture.Reading, facts: Facts, lifted: list[Lifted | Refusal | Recognised],
    found: Collected, edits: GraphEdits, way: Way, training: Training,
) -> None:  # fmt: skip
    """Let an edited graph take the place of a module's. If that fails, its sites are recorded as kept."""
    settled: list[Site] = []
    try:
        editor = Editor(reading.over(*copied(reading.graph)), facts, inner=way.inner)
        graph = _edited(reading, facts, lifted, settled, len(found.sites), way, training, editor)
        if collecting.get() is not None:
            found.before.append(source_text(gm.graph))
            found.after.append(source_text(graph))
        edits.replace(gm, graph)
        found.caches |= editor.caches.arguments
    except PlanError:
        raise
    except Exception as error:
        reason = because("editing-failed", unforeseen("editing a graph", error))
        found.notes.append(f"a graph is compiled as it is; {reason}")
        settled = [left_alone(site, reason) for site in settled]
    found.sites += settled


def left_alone(site: Site, reason: Reason) -> Site:
    """The record of a site that was fused, or decided on, in a graph that is compiled as it came."""
    kept = replace(site, reason=str(reason), code=reason.codes, became="original graph")
    return site if site.status == "refused" else replace(kept, status="kept")


def _edited(
    reading: capture.Reading, facts: Facts, lifted: list[Lifted | Refusal | Recognised], settled: list[Site],
    first: int, way: Way, training: Training, editor: Editor,
) -> fx.Graph:  # fmt: skip
    """Every site decided, in order: an edited copy of the graph. `settled` grows as it goes."""
    groups = {id(site): group for group in together([s for s in lifted if isinstance(s, Lifted)], facts)
              for site in group.sites}  # fmt: skip
    numbers = Places()
    places = {
        id(s): place
        for s in lifted
        if isinstance(s, Lifted) and way.planner is not None
        if (place := numbers.site(describe.module_path(_place(reading, s)), s, facts)) is not None
    }
    prepared = _proposals({id(j): j for j in groups.values()}.values(), facts, training, way.planner, places)
    proposals = [prepared.get(id(site)) for site in lifted]
    step("building kernels" if way.kernels else "editing the graph")
    ahead = [p for p in proposals if way.kernels and isinstance(p, Proposal)]
    specs = ((spec, p.device) for p in ahead for spec in (p.spec, *p.others))
    build_all(specs, builds_of((p.spec, p.learned, p.device) for p in ahead))
    step("editing the graph")
    verdicts: dict[fx.Node, Choice] = {}
    said: set[fx.Node] = set()
    for site, proposal in zip(lifted, proposals, strict=True):
        index = first + len(settled)
        place = _place(reading, site)
        where, path = describe.user_line(place), describe.module_path(place)
        if isinstance(site, Refusal):
            at = reading.origin.get(site.node) or reading.owner.get(site.node)
            where = (describe.user_line(at) if at else "") or where
            status, became = ("kept", "original graph") if site.kept else ("refused", "")
            settled.append(Site(index, status, str(site.reason), path, where, became=became, code=site.reason.codes))
            continue
        if isinstance(site, Recognised):
            made = _linear(site, Place(index, path, where), reading, editor, way, training)
            settled.append(made if collecting.get() is None else replace(made, **_surroundings(site, reading, editor)))
            continue
        assert proposal is not None  # every lifted site has one
        if site.node not in verdicts:
            verdicts |= _settled(groups[id(site)], prepared, facts, editor, way, training)
        if isinstance(proposal, fx.Node) and site.anchor in said:
            continue  # a softmax whose weights go to several products, and must exist
        said.add(site.anchor)
        at = Place(index, path, where)
        names = names_of(site, reading)
        made = recorded(site, proposal, verdicts[site.node], at, facts, names, kernels=way.kernels)
        settled.append(made if collecting.get() is None else replace(made, **_surroundings(site, reading, editor)))
    return editor.finish()


def _linear(
    site: Recognised, at: Place, reading: capture.Reading, editor: Editor, way: Way, training: Training
) -> Site:
    """What becomes of a linear attention, which is recorded."""
    facts, names = editor.facts, names_of(site, reading)
    kept = Site(
        at.index, "kept", str(site.reason), at.path, at.where,
        describe.linear_equation(readable(site.linear, names)), describe.linear_mask(site.linear),
        describe.shapes(site), became="original graph", ir=print_linear(site.linear), code=site.reason.codes,
        names=names, sizes=describe.sizes_of(site, facts),
    )  # fmt: skip
    spread = any(editor.reading.distributed(n) for n in site.tensors)
    proposal = None if spread or not way.kernels else linear_sites.proposed(site, facts, training)
    if proposal is None:
        return kept
    verdict = linear_sites.chosen(proposal, facts, training, measure=way.measure)
    if verdict.fused:
        try:
            linear_sites.put(proposal, editor)
        except EditError as error:
            verdict = replace(verdict, fused=False, reason=error.reason)
    made, backward = proposal.made, proposal.backward if verdict.fused else None
    return replace(
        kept, status="fused" if verdict.fused else "kept", reason=str(verdict.reason), code=verdict.reason.codes,
        became=made.shown if verdict.fused else kept.became, speedup=verdict.speedup, trains=proposal.trains,
        ir=proposal.spec, kernel=made.source, language=made.language, isa=made.isa, timings=dict(verdict.us),
        backward="" if backward is None else backward.told,
        backward_kernel=None if backward is None or backward.language == "torch" else backward.source,
    )  # fmt: skip


def _surroundings(
    site: Lifted | Recognised, reading: capture.Reading, editor: Editor
) -> dict[str, tuple[GraphNode, ...]]:
    """The graph around a site before and after it was fused, where Dynamo's graph has nodes of its own for it."""
    old, copy = reading.origin.get(site.node), editor.reading.origin.get(site.node)
    operands = {n for x in site.tensors if (n := reading.origin.get(x)) is not None}
    given = {n for x in site.tensors if (n := editor.reading.origin.get(x)) is not None}
    new = None if copy is None else editor.taken.get(copy)
    return {
        "graph": () if old is None else around(old, operands),
        "fused_graph": () if new is None else around(new, given),
    }


def _place(reading: capture.Reading, site: Lifted | Refusal | Recognised) -> fx.Node:
    """The node of Dynamo's graph that the softmax of a site stands in."""
    return reading.origin.get(site.anchor) or reading.owner[site.anchor]


def _settled(
    group: SiteGroup, proposals: Mapping[int, Proposal | fx.Node | None], facts: Facts, editor: Editor, way: Way,
    training: Training,
) -> dict[fx.Node, Choice]:  # fmt: skip
    """What becomes of each node that sites which are decided together take the place of; those chosen are fused."""
    pairs = [(site, proposal) for site in group.sites if isinstance(proposal := proposals[id(site)], Proposal)]
    nodes = dict.fromkeys(site.node for site in group.sites)
    spread = any(editor.reading.distributed(n) for site in group.sites for n in site.tensors)
    verdict = _verdict(group, [proposal for _, proposal in pairs], facts, way, training, spread=spread)
    step("editing the graph")
    found = dict.fromkeys(nodes, verdict)
    places = dict.fromkeys(_target(site) for site, _ in pairs)
    for place in places if verdict.fused else ():
        parts = [(site, proposal) for site, proposal in pairs if _target(site) is place]
        proposal = parts[0][1]
        try:
            reason = editor.put(proposal.origin, proposal.program, proposal.made)
            if reason is not None:
                why = replace(verdict, reason=because("pages-from-keys", verdict.reason, reason))
                found |= dict.fromkeys((site.node for site, _ in parts), why)
        except EditError as error:
            found |= dict.fromkeys((site.node for site, _ in parts), replace(verdict, fused=False, reason=error.reason))
    return found


def _target(site: Lifted) -> fx.Node:
    """What sites that are put into the graph together have in common."""
    return site.node if site.piece is None else site.piece.anchor


@dataclass(frozen=True)
class Way:
    """How a graph is rewritten: whether kernels are measured, who gives attentions another form, and whether kernels
    are built at all. `inner`: an operator of another graph runs it."""

    measure: bool = True
    planner: Planner | None = None
    kernels: bool = True
    inner: bool = False


def _proposals(
    groups: Iterable[SiteGroup], facts: Facts, training: Training, planner: Planner | None,
    places: Mapping[int, PlannedSite],
) -> dict[int, Proposal | fx.Node]:  # fmt: skip
    """For each site its proposal, or who needs the weights outside: then the scores exist anyway and nothing is to be
    gained."""
    found: dict[int, Proposal | fx.Node] = {}
    for group in groups:
        if group.user is not None:
            found |= {id(site): group.user for site in group.sites}
            continue
        for place in dict.fromkeys(map(_target, group.sites)):
            sites = [site for site in group.sites if _target(site) is place]
            learned = tuple(training.learned(site, facts) for site in sites)
            program = program_of(sites, facts)
            own = places.get(id(sites[0]))
            extra: dict[str, Any] = {}
            if planner is not None and own is not None:
                taken = _taken(planner, own, program, sites, facts, training if any(learned) else None)
                if isinstance(taken, Program):
                    program = replace(program, program=taken)
                    extra = {"planned": planner.says(own), "forms": planner.forms(own)}
                elif taken is not None:
                    extra = {"held": taken}
            final, stages = _run_passes(program.program, program.factors, tuple(map(bool, learned)))
            attentions = [step.node for step in final.steps if isinstance(step.node, Attention)]
            device = str(facts.value(sites[0].node).device)
            if planner is not None and own is not None:
                extra["made"] = partial(planner.made, own, program.program, final)
            others = tuple(map(_text, attentions[len(sites) :]))  # those that a plan puts beside a single one
            for site, a, names in zip(sites, attentions[: len(sites)], learned, strict=True):
                found[id(site)] = Proposal(program, final, a, _text(a), device, stages, names, others, **extra)
    return found


def _taken(
    planner: Planner, place: PlannedSite, program: SiteProgram, sites: Sequence[Lifted], facts: Facts,
    training: Training | None,
) -> Program | Reason | None:  # fmt: skip
    """What a planner makes of the sites of one place in the graph: it speaks of single attentions. What was not timed
    when the plan was made, in training or a phase that was not profiled, is measured here."""
    taken = planner.take(place, program.program)
    if not isinstance(taken, Program):
        return taken
    if len(sites) > 1:
        return because("plan-several")
    if training is None and planner.timed(place):
        return taken
    return slower(program, taken, sites[0], facts, training) or taken


@lru_cache(maxsize=256)
def _run_passes(
    p: Program, factors: tuple[tuple[Size, Expr], ...], learned: tuple[bool, ...]
) -> tuple[Program, tuple[Stage, ...]]:  # fmt: skip
    """The program after the passes, and what each did. Sites that compute the same share one, so what it costs does not
    grow with the layers. For backward the kernels keep the sums of their rows."""
    stages: list[Stage] = []
    after = standard(factors).run(p, stages.append)
    return with_sums(after, learned), tuple(stages)


@lru_cache(maxsize=256)
def _text(a: Attention) -> str:
    return print_attention(a)


def _verdict(
    group: SiteGroup, proposals: Sequence[Proposal], facts: Facts, way: Way, training: Training, *, spread: bool
) -> Choice:  # fmt: skip
    """`spread`: the sites' tensors are distributed over processes."""
    if group.user is not None:
        name = used_by(facts, group.user)
        return Choice(False, None, because("weights-needed", name))
    if not way.kernels:
        return Choice(True, None, because("measuring-off"))
    kernels = [built(proposal.spec, proposal.device) for proposal in proposals]
    others = (built(spec, proposal.device) for proposal in proposals for spec in proposal.others)
    slow = next((made for made in (*kernels, *others) if made.language == "torch"), None)
    if slow is not None:
        return Choice(False, None, because("no-kernel", slow.reason))
    planned = [proposal.planned for proposal in proposals if proposal.planned]
    if planned:
        return Choice(True, None, because("planned", *planned))
    if not way.measure:
        return Choice(True, None, because("measuring-off"))
    if spread:
        why = "its tensors are distributed, and all processes must decide alike"
        return unmeasured(any(p.learned for p in proposals), why)
    parts = [
        Candidate(site, p.final, p.spec, made, p.learned)
        for site, p, made in zip(group.sites, proposals, kernels, strict=True)
    ]
    return decide(parts, facts, training)
