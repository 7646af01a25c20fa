"""ONNX in, ONNX out: each attention as the standard operator `Attention`; every other node stays as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch import fx

from attncc.codegen.cpp.onnxruntime import DOMAIN
from attncc.codegen.onnx import Inexpressible, Nodes, Value, attention
from attncc.convert.onnx_kernels import KernelLibrary
from attncc.convert.onnx_tracing import Traced
from attncc.driver import describe
from attncc.driver.lowering import is_direct
from attncc.driver.site_groups import SiteGroup, together
from attncc.frontends.onnx.control import graphs_of
from attncc.frontends.onnx.reading import every_graph, every_node
from attncc.frontends.onnx.values import DTYPES
from attncc.ir import Attention, Const, Expr, Program, Size, kind_of, print_attention
from attncc.ir.evaluate import int_value
from attncc.ir.expr import free
from attncc.ir.reasons import Reason, because
from attncc.kernels.build import optimise
from attncc.passes.pipeline import Pipeline
from attncc.passes.rewrites.drop_rounding import DropRounding
from attncc.passes.rewrites.fold_predicates import FoldPredicates
from attncc.patterns.lift import Refusal, lift_all
from attncc.patterns.linear.linear import Recognised
from attncc.patterns.refusals.reasons import used_by
from attncc.patterns.site.assemble import Lifted
from attncc.patterns.site.program import SiteProgram, program_of
from attncc.report.site import Site

if TYPE_CHECKING:
    from attncc.patterns.graph.facts import Facts

_ALREADY = "already"
#: The version of the standard operators that `Attention` came with.
OPSET = 23


@dataclass
class Operated:
    """What was found in a graph, and how many attentions were rewritten."""

    sites: list[Site] = field(default_factory=list)
    count: int = 0


def operate(model: ir.Model, traced: Traced, kernels: KernelLibrary | None = None) -> Operated:
    """Rewrite the attentions of a model whose trace is given; those that have one as operators of `kernels`."""
    facts = traced.facts()
    lifted = lift_all(facts)
    groups = together([s for s in lifted if isinstance(s, Lifted)], facts)
    nodes = Nodes("attncc")  # one for all: what sites share makes its nodes where it is used
    shared: dict[ir.Graph, dict[object, Value]] = {}
    by_site = {id(s): g for g in groups for s in g.sites}
    done: dict[fx.Node, str] = {}
    found = Operated()
    for site in lifted:
        index = len(found.sites)
        value = traced.values.get(site.anchor)
        where = "" if value is None else str(value.name)
        if isinstance(site, Refusal):
            status, became = ("kept", "its own nodes") if site.kept else ("refused", "")
            found.sites.append(Site(index, status, str(site.reason), where, became=became, code=site.reason.codes))
            continue
        if isinstance(site, Recognised):
            found.sites.append(Site(
                index, "kept", str(site.reason), where, equation=describe.linear_equation(site.linear),
                became="its own nodes", code=site.reason.codes,
            ))  # fmt: skip
            continue
        if site.node not in done:
            nodes.prefix, nodes.made = f"attncc_{index}", []
            done[site.node] = _rewrite(model, traced, facts, by_site[id(site)], site, nodes, shared, kernels)
        own = kernels is not None and kernels.has(optimise(site.attention))
        became = "attncc's kernel" if own else "Attention"
        found.sites.append(_record(index, where, site, done[site.node], became))
        found.count += not done[site.node]
    found.sites += [
        Site(len(found.sites) + n, "kept", str(reason), str(node.name), became="its own nodes", code=reason.codes)
        for n, (node, reason) in enumerate(_recurrences(model))
    ]
    if found.count:
        _clean(model)
        said = f"Attention of opset {OPSET}" if kernels is None or not kernels.called else "attncc's kernels"
        model.metadata_props["attncc"] = f"{found.count} attentions rewritten as {said}"
        if kernels is not None and kernels.called:
            model.opset_imports[DOMAIN] = 1
    return found


def _recurrences(model: ir.Model) -> Iterator[tuple[ir.Node, Reason]]:
    """Loops that carry on what products are made with: linear attention, or another recurrence of layers."""
    for node in every_node(model):
        for body in graphs_of(node).values() if node.op_type in ("Scan", "Loop") else ():
            first, last = (2, None) if node.op_type == "Loop" else (0, -node.attributes["num_scan_inputs"].as_int())
            carried = body.inputs[first:last]
            made = set(carried)
            products = 0
            for n in body:
                if not made.isdisjoint(n.inputs):
                    products += n.op_type in ("MatMul", "Gemm", "Einsum")
                    made.update(n.outputs)
            if products and not any(n.op_type == "Softmax" for n in body):
                yield node, because("onnx-recurrence", node.op_type)


def _record(index: int, where: str, site: Lifted, why: str, became: str) -> Site:
    shown = optimise(site.attention)
    reason = None if not why else because("onnx-attention") if why == _ALREADY else because("onnx-inexpressible", why)
    return Site(
        index, "kept" if why else "fused", "" if reason is None else str(reason), where, "", describe.equation(shown),
        describe.mask(shown), describe.shapes(site), became="its own nodes" if why else became,
        ir=print_attention(shown), code="" if reason is None else reason.codes,
    )  # fmt: skip


def _rewrite(
    model: ir.Model, traced: Traced, facts: Facts, group: SiteGroup, site: Lifted, nodes: Nodes,
    shared: dict[ir.Graph, dict[object, Value]], kernels: KernelLibrary | None,
) -> str:  # fmt: skip
    """Why the attentions of a place stay as they are; nothing where they were rewritten."""
    if group.user is not None:
        return f"its weights are needed by {used_by(facts, group.user)}"
    place = [s for s in group.sites if s.node is site.node]
    if any(s.piece is not None for s in place):
        return "it is one of several pieces of a softmax"
    program = program_of(place, facts)
    if len(program.outputs) != 1:
        return "the sums of its rows are used"
    old = traced.values.get(program.outputs[0])
    producer = None if old is None else old.producer()
    if old is None or producer is None:
        return "its output is inside of a node"
    if producer.op_type == "Attention":
        return _ALREADY
    final = Pipeline((DropRounding(), FoldPredicates())).run(program.program)
    graph = producer.graph
    assert isinstance(graph, ir.Graph)  # it was run
    nodes.shared = shared.setdefault(graph, {})
    prefix, known = nodes.prefix, dict(nodes.shared)
    try:
        new = _emitted(nodes, traced, facts, program, final, kernels)
    except (Inexpressible, NotImplementedError) as error:
        nodes.shared.clear()
        nodes.shared.update(known)  # what was made for this one is not put into the graph
        return str(error)
    made = nodes.made
    out = new.value
    if not _visible(model, made, graph):
        nodes.shared.clear()
        nodes.shared.update(known)
        return "it reads what is inside of another graph of the file"
    if out.producer() not in made:
        made.append(ir.node("Identity", [out], name=f"{prefix}/Identity"))
        out = made[-1].outputs[0]
    graph.insert_before(producer, made)
    name, shape, dtype = old.name, old.shape, old.dtype
    old.name = f"{prefix}/replaced"
    out.name, out.shape = name, shape
    if dtype is not None:
        out.dtype = dtype
    ir.convenience.replace_all_uses_with(old, out, replace_graph_outputs=True)
    return ""


def _visible(model: ir.Model, made: Sequence[ir.Node], graph: ir.Graph) -> bool:
    """Whether nodes that are put into a graph read only what it, or a graph around it, has."""
    outer = {inner: g for g in every_graph(model) for node in g for inner in graphs_of(node).values()}
    around = {graph}
    while graph in outer:
        graph = outer[graph]
        around.add(graph)
    own = {x for n in made for x in n.outputs}
    return all(x is None or x in own or x.graph in around for n in made for x in n.inputs)


def _emitted(
    nodes: Nodes, traced: Traced, facts: Facts, site: SiteProgram, p: Program, kernels: KernelLibrary | None
) -> Value:
    values: dict[str, Value] = {}
    sizes: dict[Expr, Any] = {}
    spelled = dict(zip(p.sizes, site.sizes, strict=True))
    for t, n, dtype in zip(p.inputs, site.inputs, site.dtypes, strict=True):
        extents = tuple(int(x.value) if isinstance(x, Const) else None for x in t.shape)
        value = _held(nodes, traced, n, extents).to(dtype)
        for at, x in enumerate(t.shape):
            if isinstance(x, Size) and x not in sizes:
                key = "size", spelled[x]
                sizes[x] = nodes.shared[key] = nodes.shared.get(key) or value.extent(at)
        values[t.name] = Value(
            nodes, value.value, value.dtype,
            tuple(sizes[x] if isinstance(x, Size) else e for x, e in zip(t.shape, extents, strict=True)),
        )  # fmt: skip
    for x in p.sizes:
        if x not in sizes:
            sizes[x] = _computed(nodes, traced, facts, spelled[x])
    for step in p.steps:
        given = [values[x] for x in step.arguments]
        extents = [int_value(x, sizes) for x in step.sizes]
        names = [t.name for t in kind_of(step.node).gives(step.node)]
        if isinstance(step.node, Attention):
            own = dict(zip(step.node.sizes, extents, strict=True))
            use = attention if kernels is None or not kernels.has(step.node) else kernels.call
            result: dict[str, Any] = {"out": use(step.node, given, own)}
        elif is_direct(step.node):
            by_name: Any = {t.name: x for t, x in zip(step.node.tensors, given, strict=True)}
            result = dict(kind_of(step.node).interpret(step.node, by_name, extents))
        else:
            raise Inexpressible(f"it takes a node of the kind {type(step.node).__name__.lower()}")
        values |= {r: result[n] for r, n in zip(step.results, names, strict=True)}
    return values[p.outputs[0]]


def _held(nodes: Nodes, traced: Traced, n: fx.Node, extents: tuple[Any, ...]) -> Value:
    """What a node of the trace holds; nodes that the reader made beside it, of those of the trace."""
    held = traced.values.get(n)
    if held is not None:
        own = DTYPES.get(int(held.dtype)) if held.dtype is not None else None
        return Value(nodes, held, n.meta["val"].dtype if own is None else own, extents)
    if n.target is torch.ops.aten.to.dtype:
        return _held(nodes, traced, n.all_input_nodes[0], extents).to(n.args[1])  # type: ignore[arg-type]
    raise Inexpressible(f"it reads what is inside of a node ({n.target})")


def _computed(nodes: Nodes, traced: Traced, facts: Facts, size: Expr) -> Any:
    """A size that no tensor at hand has, from the extents of the model's inputs."""
    table: dict[Expr, Any] = {}
    for symbol in free(size):
        for n in traced.graph.find_nodes(op="placeholder"):
            shape = facts.shape(n)
            if symbol in shape and symbol not in table and n in traced.values:
                value = Value(nodes, traced.values[n], n.meta["val"].dtype, (None,) * len(shape))
                table[symbol] = value.extent(shape.index(symbol))
    try:
        return int_value(size, table)
    except (KeyError, TypeError) as error:
        raise Inexpressible("one of its sizes is no extent of what it reads") from error


def _clean(model: ir.Model) -> None:
    from onnx_ir.passes.common import RemoveUnusedNodesPass  # noqa: PLC0415

    RemoveUnusedNodesPass()(model)
    model.graph.sort()  # what attentions share was made at the first one found, which need not be the first to run
