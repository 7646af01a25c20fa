"""Lowering: a program becomes nodes of the graph that is edited.

A node with a kernel becomes a call of attncc's operator. The others are what their interpreters do, traced into the
graph for Inductor to compile: directly where that only takes methods of tensors, and through fake tensors where indices
have to be made.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import fx
from torch.fx.proxy import GraphAppendingTracer

from attncc import torch_private
from attncc.ir import (
    Attention,
    Boxes,
    Correct,
    Expr,
    Merge,
    Node,
    Program,
    Rearrange,
    Step,
    Table,
    kind_of,
    print_attention,
)
from attncc.ir.boxes import order_of, pages, queries
from attncc.ir.evaluate import DTYPE_OF, int_value

#: A size of a call: a number, or the node that holds it.
Extent = int | fx.Node
#: Tensors from those of a node, by name, and its sizes.
_Compute = Callable[[Mapping[str, torch.Tensor], Sequence[Any]], tuple[torch.Tensor, ...]]


def lower(
    p: Program, graph: fx.Graph, inputs: Sequence[fx.Node], sizes: Sequence[Extent],
    examples: Sequence[Any] = (), mark: Callable[[fx.Node], object] = lambda n: None,
    kept: Mapping[str, fx.Node | None] = MappingProxyType({}),
) -> list[fx.Node]:  # fmt: skip
    """The nodes that hold the outputs of `p`, made at the insertion point of `graph`.

    `examples` are what the sizes were when the graph was captured, numbers or symbols; they are needed where indices
    have to be made, and their fake tensor mode is that of the trace in which this is called. `mark` sees each call of
    the operator. `kept`: inputs whose boxes are kept beside them, and the positions that the graph writes to there."""
    tracer = GraphAppendingTracer(graph)
    values: dict[str, fx.Node] = {t.name: n for t, n in zip(p.inputs, inputs, strict=True)}
    table: dict[Expr, Any] = {
        s: fx.Proxy(x, tracer) if isinstance(x, fx.Node) else x for s, x in zip(p.sizes, sizes, strict=True)
    }
    for step in p.steps:
        arguments = [values[x] for x in step.arguments]
        extents = [int_value(x, table) for x in step.sizes]
        names = [t.name for t in kind_of(step.node).gives(step.node)]
        if isinstance(step.node, Attention):
            found = _call(step.node, graph, arguments, [_node(x) for x in extents], mark)
        elif is_direct(step.node):
            found = _direct(step.node, [fx.Proxy(x, tracer) for x in arguments], extents)
        else:
            seen: dict[Expr, Any] = dict(zip(p.sizes, examples, strict=True))
            known = [int_value(x, seen) for x in step.sizes]
            trace = partial(_traced, step.node, graph, arguments, [_node(x) for x in extents], known, _device(inputs))
            of = keys_of(step)
            if isinstance(step.node, Boxes) and of in kept:
                count = int_value(step.node.p.extent, dict(zip(step.node.sizes, extents, strict=True)))
                found = _kept(step.node, graph, values[of], kept[of], _node(count), trace)
            else:
                found = dict(zip(names, trace(partial(_interpreted, step.node)), strict=True))
        values |= {result: found[name] for result, name in zip(step.results, names, strict=True)}
    return [values[x] for x in p.outputs]


def keys_of(step: Step) -> str:
    """The value that the boxes of a step are of; nothing for a step that makes none."""
    a = step.node
    return step.arguments[[t.name for t in a.tensors].index(a.k.tensor)] if isinstance(a, Boxes) else ""


def is_direct(node: Node) -> bool:
    """Whether the interpreter of a node only calls methods of its tensors, so that stand-ins can be passed."""
    return isinstance(node, Merge | Rearrange | Table) or (isinstance(node, Correct) and node.all_views)


def _device(inputs: Sequence[fx.Node]) -> torch.device:
    """Where the tensors of a program lie."""
    known = (n.meta.get("example_value") for n in inputs)
    return next((x.device for x in known if isinstance(x, torch.Tensor)), torch.device("cpu"))


def _node(x: Any) -> Extent:
    return x.node if isinstance(x, fx.Proxy) else x


def _call(
    a: Attention, graph: fx.Graph, tensors: Sequence[fx.Node], sizes: Sequence[Extent],
    mark: Callable[[fx.Node], object],
) -> dict[str, fx.Node]:  # fmt: skip
    call = graph.call_function(torch.ops.attncc.attention.default, (list(tensors), list(sizes), print_attention(a)))
    mark(call)
    return {name: graph.call_function(operator.getitem, (call, n)) for n, name in enumerate(a.outputs)}


def _direct(node: Node, tensors: Sequence[fx.Proxy], sizes: Sequence[Any]) -> dict[str, fx.Node]:
    given: Mapping[str, Any] = {t.name: x for t, x in zip(node.tensors, tensors, strict=True)}
    return {name: x.node for name, x in kind_of(node).interpret(node, given, sizes).items()}  # type: ignore[attr-defined]


def _interpreted(node: Node, tensors: Mapping[str, torch.Tensor], sizes: Sequence[Any]) -> tuple[torch.Tensor, ...]:
    kind = kind_of(node)
    found = kind.interpret(node, tensors, sizes)
    return tuple(found[t.name] for t in kind.gives(node))


def _kept(
    a: Boxes, graph: fx.Graph, keys: fx.Node, written: fx.Node | None, count: Extent,
    trace: Callable[[_Compute], Sequence[fx.Node]],
) -> dict[str, fx.Node]:  # fmt: skip
    """The bounds of boxes that are kept: a call of the operator that keeps them. `count`: of the pages."""
    order = order_of(a)
    assert order is not None  # or they are not kept
    given = trace(lambda tensors, sizes: (queries(a, tensors, sizes), *pages(a, tensors, sizes)))
    arguments = (*given, keys, written, list(order), a.size, count)
    return {"out": graph.call_function(torch.ops.attncc.kept_boxes.default, arguments)}


def _traced(
    node: Node, graph: fx.Graph, tensors: Sequence[fx.Node], sizes: Sequence[Extent], examples: Sequence[Any],
    device: torch.device, compute: _Compute,
) -> Sequence[fx.Node]:  # fmt: skip
    """What `compute` makes of fake tensors of the node's shapes and its sizes, its operations copied into the graph."""
    table: dict[Expr, Any] = dict(zip(node.sizes, examples, strict=True))

    def run(*given: Any) -> tuple[Any, ...]:
        count = len(node.tensors)
        own = {t.name: x for t, x in zip(node.tensors, given[:count], strict=True)}
        return compute(own, list(given[count:]))

    shapes = [([int_value(n, table) for n in t.shape], DTYPE_OF[t.dtype]) for t in node.tensors]
    traced = torch_private.trace_on_fakes(run, shapes, list(examples), device)
    placeholders = [n for n in traced.graph.nodes if n.op == "placeholder"]
    known: dict[fx.Node, Any] = dict(zip(placeholders, [*tensors, *sizes], strict=True))
    for n in traced.graph.nodes:
        if n.op == "get_attr":
            known[n] = _constant(graph, getattr(traced, str(n.target)))
    result: Any = graph.graph_copy(traced.graph, known)
    for n in known.values():
        if isinstance(n, fx.Node) and n.graph is graph:
            n.meta.pop("val", None)  # fakes of another trace
    return result


def _constant(graph: fx.Graph, value: torch.Tensor) -> fx.Node:
    """A small tensor that a trace met, made in the graph."""
    made = graph.call_function(torch.tensor, (value.tolist(),), {"dtype": value.dtype, "device": value.device})
    return made
