"""ONNX in, ONNX out: each attention as one operator of the runtime that is asked for; every other node stays."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
from torch import fx

from attncc.codegen.cpp.onnxruntime import DOMAIN
from attncc.codegen.onnx import STANDARD, Inexpressible, Row, Value, attention
from attncc.codegen.onnx.onnxruntime import CPU, CUDA
from attncc.codegen.onnx.onnxruntime import DOMAIN as CONTRIB
from attncc.convert.onnx_exchange import Exchange, linear_rewritten, recurrence_rewritten
from attncc.convert.onnx_graphs import recurrences
from attncc.convert.onnx_kernels import KernelLibrary
from attncc.convert.onnx_tracing import Traced
from attncc.driver import describe
from attncc.driver.lowering import is_direct
from attncc.driver.site_groups import SiteGroup, together
from attncc.frontends.onnx.reading import every_node, opset_of
from attncc.ir import Attention, Program, kind_of, print_attention
from attncc.ir.evaluate import int_value
from attncc.ir.reasons import because
from attncc.kernels.build import optimise
from attncc.passes.pipeline import Pipeline
from attncc.passes.rewrites.drop_rounding import DropRounding
from attncc.passes.rewrites.fold_predicates import FoldPredicates
from attncc.passes.rewrites.split_axes import SplitAxes
from attncc.patterns.lift import Refusal, lift_all
from attncc.patterns.linear.linear import Recognised
from attncc.patterns.refusals.reasons import used_by
from attncc.patterns.site.assemble import Lifted
from attncc.patterns.site.program import SiteProgram, program_of
from attncc.report.site import Site
from attncc.version import __version__

if TYPE_CHECKING:
    pass

_ALREADY = "already"
#: The version of the standard operators that `Attention` came with, and those that can be asked for.
OPSET = 23
OPSETS = range(23, 28)
#: The rows of a target and a provider.
ROWS: dict[tuple[str, str], Sequence[Row]] = {
    ("onnx", "cpu"): STANDARD, ("onnxruntime", "cpu"): CPU, ("onnxruntime", "cuda"): CUDA,
}  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """What the file is for: a runtime that knows the standard operators (`onnx`), or onnxruntime and one of its
    providers; `kernels` are attncc's own, which come first. `only` names an operator that is to be taken alone."""

    target: str = "onnx"
    provider: str = "cpu"
    opset: int = OPSET
    kernels: KernelLibrary | None = None
    only: str = ""

    @property
    def rows(self) -> Sequence[Row]:
        return [r for r in ROWS[self.target, self.provider] if self.only in ("", r.name)]


@dataclass
class Operated:
    """What was found in a graph, and which operators were written how often."""

    sites: list[Site] = field(default_factory=list)
    written: Counter[str] = field(default_factory=Counter)

    @property
    def count(self) -> int:
        return self.written.total()


def operate(model: ir.Model, traced: Traced, asked: Asked) -> Operated:
    """Rewrite the attentions of a model whose trace is given."""
    facts = traced.facts()
    lifted = lift_all(facts)
    groups = together([s for s in lifted if isinstance(s, Lifted)], facts)
    exchange = Exchange(model, traced, facts)
    by_site = {id(s): g for g in groups for s in g.sites}
    domain, opset = CONTRIB if asked.target != "onnx" else "", max(asked.opset, opset_of(model))
    done: dict[fx.Node, _Done] = {}
    found = Operated()
    for site in lifted:
        index = len(found.sites)
        prefix = f"attncc_{index}"
        value = traced.values.get(site.anchor)
        where = "" if value is None else str(value.name)
        if isinstance(site, Refusal):
            status, became = ("kept", "its own nodes") if site.kept else ("refused", "")
            found.sites.append(Site(index, status, str(site.reason), where, became=became, code=site.reason.codes))
            continue
        if isinstance(site, Recognised):
            exchange.begin(prefix, traced.values.get(site.node))
            why = linear_rewritten(exchange, site, domain, opset)
            reason = because("onnx-inexpressible", why) if why else None
            found.sites.append(Site(
                index, "kept" if why else "fused", str(reason or ""), where, "",
                describe.linear_equation(site.linear), became="its own nodes" if why else "LinearAttention",
                code=reason.codes if reason else "",
            ))  # fmt: skip
            found.written.update([] if why else ["LinearAttention"])
            continue
        if site.node not in done:
            was = _rewrite(exchange, prefix, by_site[id(site)], site, asked)
            inside = traced.within(site.node)
            stands = was.why and inside is not None and inside.op_type == "Attention"
            done[site.node] = _Done(_ALREADY) if stands else was
        was = done[site.node]
        found.sites.append(_record(index, where, site, was))
        if not was.why:
            found.written[was.operator] += 1
    for node in list(recurrences(model)):
        index = len(found.sites)
        exchange.begin(f"attncc_{index}", node.outputs[0])
        equation, why = recurrence_rewritten(exchange, node, domain, opset)
        inside = because("onnx-recurrence", node.op_type, why)
        reason = because("onnx-inexpressible", why) if equation else inside
        found.sites.append(Site(
            index, "kept" if why else "fused", str(reason) if why else "", str(node.name or node.outputs[0].name), "",
            equation, became="its own nodes" if why else "LinearAttention", code=reason.codes if why else "",
        ))  # fmt: skip
        found.written.update([] if why else ["LinearAttention"])
    if found.count:
        _finish(model, found, asked)
    return found


@dataclass(frozen=True)
class _Done:
    """Why the attentions of a place stay as they are, or the operator that they became."""

    why: str = ""
    operator: str = ""


def _finish(model: ir.Model, found: Operated, asked: Asked) -> None:
    _clean(model)
    counted = ", ".join(f"{n} as {name}" for name, n in sorted(found.written.items()))
    model.metadata_props["attncc"] = f"attncc {__version__}, for {asked.target}: attentions rewritten, {counted}"
    model.metadata_props["attncc.sites"] = json.dumps(
        [{"at": s.where, "became": s.became, "equation": s.equation, "mask": s.mask} for s in found.sites
         if s.status == "fused"]
    )  # fmt: skip
    used = {n.domain for n in every_node(model)}
    for domain in (DOMAIN, CONTRIB):
        if domain in used:
            model.opset_imports[domain] = 1


def _record(index: int, where: str, site: Lifted, was: _Done) -> Site:
    shown, why = optimise(site.attention), was.why
    reason = None if not why else because("onnx-attention") if why == _ALREADY else because("onnx-inexpressible", why)
    return Site(
        index, "kept" if why else "fused", "" if reason is None else str(reason), where, "", describe.equation(shown),
        describe.mask(shown), describe.shapes(site), became="its own nodes" if why else was.operator,
        ir=print_attention(shown), code="" if reason is None else reason.codes,
    )  # fmt: skip


def _rewrite(exchange: Exchange, prefix: str, group: SiteGroup, site: Lifted, asked: Asked) -> _Done:
    facts, nodes = exchange.facts, exchange.nodes
    if group.user is not None:
        return _Done(f"its weights are needed by {used_by(facts, group.user)}")
    place = [s for s in group.sites if s.node is site.node]
    if any(s.piece is not None for s in place):
        return _Done("it is one of several pieces of a softmax")
    program = program_of(place, facts)
    if len(program.outputs) != 1:
        return _Done("the sums of its rows are used")
    old = exchange.traced.values.get(program.outputs[0])
    producer = None if old is None else old.producer()
    if old is None or producer is None:
        return _Done("its output is inside of a node")
    exact = DropRounding(), FoldPredicates()
    final = Pipeline(exact).run(program.program)
    split = Pipeline((SplitAxes(tuple(program.factors)), *exact)).run(program.program)
    reasons: list[str] = []
    for form in (final,) if split == final else (final, split):  # shared heads are split only where they have to be
        exchange.begin(prefix, old)
        known = dict(nodes.shared)
        try:
            operator, new = _emitted(exchange, program, form, asked)
            if not _as_good(producer, nodes.made):
                exchange.put([(old, new)])
                return _Done("", operator)
            reasons.append(_ALREADY)
        except (Inexpressible, NotImplementedError) as error:
            reasons.append(str(error))
        nodes.shared.clear()
        nodes.shared.update(known)  # what was made for this one is not put into the graph
    return _Done(reasons[0])


def _as_good(producer: ir.Node, made: Sequence[ir.Node]) -> bool:
    """Whether a node is the operator already that would take its place, with no larger a mask."""
    if producer.op_type != "Attention":
        return False
    again = [n for n in made if n.op_type == "Attention"]
    masked = any(len(n.inputs) > 3 and n.inputs[3] is not None for n in again)
    return bool(again) and (masked or len(producer.inputs) <= 3 or producer.inputs[3] is None)


def _emitted(exchange: Exchange, site: SiteProgram, p: Program, asked: Asked) -> tuple[str, Value]:
    """(operator, output) of a program."""
    operator = ""
    values, sizes = exchange.given(p.inputs, site.inputs, site.dtypes, dict(zip(p.sizes, site.sizes, strict=True)))
    for step in p.steps:
        given = [values[x] for x in step.arguments]
        extents = [int_value(x, sizes) for x in step.sizes]
        names = [t.name for t in kind_of(step.node).gives(step.node)]
        if isinstance(step.node, Attention):
            own = dict(zip(step.node.sizes, extents, strict=True))
            if asked.kernels is not None and asked.kernels.has(step.node):
                operator, out = "attncc's kernel", asked.kernels.call(step.node, given, own)
            else:
                operator, out = attention(step.node, given, own, asked.rows, asked.opset)
            result: dict[str, Any] = {"out": out}
        elif is_direct(step.node):
            by_name: Any = {t.name: x for t, x in zip(step.node.tensors, given, strict=True)}
            result = dict(kind_of(step.node).interpret(step.node, by_name, extents))
        else:
            raise Inexpressible(f"it takes a node of the kind {type(step.node).__name__.lower()}")
        values |= {r: result[n] for r, n in zip(step.results, names, strict=True)}
    return operator, values[p.outputs[0]]


def _clean(model: ir.Model) -> None:
    from onnx_ir.passes.common import RemoveUnusedNodesPass  # noqa: PLC0415

    RemoveUnusedNodesPass()(model)
    model.graph.sort()  # what attentions share was made at the first one found, which need not be the first to run
