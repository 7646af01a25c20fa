"""Decoders merged into one file as optimum writes them: with the past or without it, as an input of `If` says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, compose, helper


def merged(without: Path, with_past: Path, path: Path) -> None:
    """Write a file of two: `without` takes tokens and a mask, `with_past` those and past keys and values. Both give the
    same outputs."""
    first, second = (_named(onnx.load(p), prefix) for p, prefix in ((without, "no_past/"), (with_past, "past/")))
    inputs = {v.name: v for m in (first, second) for v in m.graph.input}
    outputs = [v.name for v in second.graph.output]
    data = {x.name: x for m in (first, second) for x in m.graph.initializer}
    branches = [_branch(m, outputs) for m in (first, second)]
    node = helper.make_node("If", ["use_cache_branch"], outputs, then_branch=branches[1], else_branch=branches[0],
                            name="optimum::if")  # fmt: skip
    flag = helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1])
    graph = helper.make_graph([node], "merged", [*inputs.values(), flag], [_open(v) for v in second.graph.output],
                              list(data.values()))  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=list(second.opset_import), ir_version=second.ir_version), path)


def _named(model: Any, prefix: str) -> Any:
    """A model whose inner names begin with `prefix`; those of its inputs stay, its outputs are called by place."""
    inputs = {v.name: v.name for v in model.graph.input}
    found = compose.add_prefix(model, prefix)
    names = {f"{prefix}{n}": n for n in inputs} | {v.name: f"out{n}" for n, v in enumerate(found.graph.output)}
    for node in found.graph.node:
        node.input[:] = [names.get(x, x) for x in node.input]
        node.output[:] = [names.get(x, x) for x in node.output]
    for v in (*found.graph.input, *found.graph.output):
        v.name = names.get(v.name, v.name)
    return found


def _branch(model: Any, outputs: list[str]) -> Any:
    wanted = {v.name: v for v in model.graph.output}
    return helper.make_graph(list(model.graph.node), f"branch_{model.graph.name}", [], [wanted[n] for n in outputs])


def _open(v: Any) -> Any:
    """An output of which no size is known."""
    kind = v.type.tensor_type
    return helper.make_tensor_value_info(v.name, kind.elem_type, [None] * len(kind.shape.dim))
