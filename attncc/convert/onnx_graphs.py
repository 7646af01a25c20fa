"""Graphs within the graphs of an ONNX file: what their nodes may read, and the loops that are recurrences of layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx_ir as ir

from attncc.frontends.onnx.control import graphs_of
from attncc.frontends.onnx.reading import every_graph, every_node


def visible(model: ir.Model, made: Sequence[ir.Node], graph: ir.Graph) -> bool:
    """Whether nodes that are put into a graph read only what it, or a graph around it, has."""
    outer = {inner: g for g in every_graph(model) for node in g for inner in graphs_of(node).values()}
    around = {graph}
    while graph in outer:
        graph = outer[graph]
        around.add(graph)
    own = {x for n in made for x in n.outputs}
    return all(x is None or x in own or x.graph in around for n in made for x in n.inputs)


def recurrences(model: ir.Model) -> Iterator[ir.Node]:
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
                yield node
