"""What is kept of a site when all is decided: its record in a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from torch import fx

from attncc.driver import describe
from attncc.driver.candidate import Choice
from attncc.driver.collected import collecting
from attncc.driver.names import readable
from attncc.driver.training_selection import FORWARD
from attncc.ir import Attention, Program, print_attention, print_program
from attncc.ir.reasons import Reason, because
from attncc.kernels.build import built, optimise
from attncc.kernels.gradients import described
from attncc.passes.pipeline import Stage
from attncc.patterns.graph.facts import Facts
from attncc.patterns.site.assemble import Lifted
from attncc.patterns.site.program import SiteProgram
from attncc.report.site import HeadForm, Site
from attncc.runtime.outputs import signature_of


def _unseen(call: fx.Node) -> None:
    """Nobody asks for the calls that sites become."""


@dataclass(frozen=True)
class Proposal:
    """What a site would become: its program after the passes, shared by the sites of one place, its own attention in
    there with its text, the device it runs on, and what each pass did. `learned` names the tensors whose gradients are
    wanted; `others` are the texts of attentions that a plan puts beside the site's own. `planned`: what a plan says of
    it, where it follows one, and `forms` the same as values; `held` is why it does not, where it should."""

    origin: SiteProgram
    program: Program
    final: Attention
    spec: str
    device: str
    stages: tuple[Stage, ...] = ()
    learned: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    planned: str = ""
    forms: tuple[HeadForm, ...] = ()
    held: Reason | None = None
    made: Callable[[fx.Node], object] = _unseen


@dataclass(frozen=True)
class Place:
    """Where a site is: its number in the graph, the path of its module, and the user's line."""

    index: int
    path: str
    where: str


def recorded(
    site: Lifted, proposal: Proposal | fx.Node, verdict: Choice, place: Place, facts: Facts,
    names: Mapping[str, str], *, kernels: bool = True,
) -> Site:  # fmt: skip
    """The record of a site that was understood. `names` are those that the graph has for its tensors; without `kernels`
    none was built. What takes time to find out is left out where nobody collects it."""
    shown = optimise(site.attention)
    read = readable(shown, names)
    own = proposal if isinstance(proposal, Proposal) else None
    if own is not None and own.held is not None:
        verdict = replace(verdict, reason=because("plan-held", verdict.reason, own.held))
    made = built(own.spec, own.device) if own is not None and kernels else None
    shown_program, stages, sizes = None, (), None
    area, picture = None, None
    if collecting.get() is not None:
        if own is not None:
            shown_program = print_program(own.program)
            stages = _printed(own.origin.program, own.stages)
        sizes = describe.sizes_of(site, facts)
        if sizes is not None and not (own is not None and own.forms):  # what its heads see, a call tells
            area, picture = describe.extent_of(shown, sizes)
            area = area if made is None else made.area(area)
    backward: tuple[str, str | None] = ("", None)
    if own is not None and own.learned and verdict.fused and kernels:
        backward = described(signature_of(own.spec).attention, own.learned, own.device)
    return Site(
        place.index, "fused" if verdict.fused else "kept", str(verdict.reason), place.path, place.where,
        describe.equation(read), describe.mask(read), describe.shapes(site),
        visible=None if area is None else area.visible, visited=None if area is None else area.visited,
        total=None if area is None else area.total,
        became="original graph" if not verdict.fused else "attncc::attention" if made is None else made.shown,
        speedup=verdict.speedup,
        trains=own is not None and bool(own.learned),
        ir=print_attention(shown) if own is None else own.spec, program=shown_program,
        kernel=None if made is None else made.source, language=None if made is None else made.language,
        picture=picture, sizes=sizes, code=verdict.reason.codes, names=dict(names),
        timings={n: us for n, us in verdict.us.items() if n != FORWARD}, forward_us=verdict.us.get(FORWARD),
        isa="" if made is None else made.isa, forms=() if own is None else own.forms, stages=stages,
        head=0 if own is None else next((f.heads[0] for f in own.forms if f.form != "exact" and f.heads), 0),
        backward=backward[0], backward_kernel=backward[1],
    )  # fmt: skip


@lru_cache(maxsize=256)
def _printed(lifted: Program, stages: tuple[Stage, ...]) -> tuple[tuple[str, str], ...]:
    """The text of a program as it was lifted, and after each pass."""
    return ("lifting", print_program(lifted)), *((x.made_by.name, print_program(x.after)) for x in stages)
