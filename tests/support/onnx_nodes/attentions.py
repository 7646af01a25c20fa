"""Attentions of the IR as ONNX models of one operator, run by onnxruntime."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from attncc.codegen.onnx import Nodes, Row, Value, attention
from attncc.codegen.onnx.nodes import TYPES
from attncc.ir import Attention, Const, parse_attention
from attncc.ir.evaluate import DTYPE_OF

TEXT = """attention
size   {sizes}
batch  b = {B}, h = {H}
axis   i = {N}, j = {M}, d = {D}, e = {E}
tensor q: {dtype}[{B}, {H}, {N}, {D}]
tensor k: {dtype}[{B}, {G}, {M}, {D}]
tensor v: {dtype}[{B}, {G}, {M}, {E}]
{tensors}q      q[b, h, i, d]
k      k[b, {head}, j, d]
v      v[b, {head}, j, e]
score  {score}
mask   {mask}
norm   softmax
empty  {empty}
{sink}weight w
give   out
dtype  {dtype}
layout b, h, i, e
"""


def written(
    *, mask: str = "True", score: str = "s * 0.25", empty: str = "zero", dtype: str = "f32", tensors: str = "",
    sink: str = "", heads: int = 4, kv: int = 4, d: int = 8, e: int = 8, rows: Any = 6, keys: Any = 6, batch: Any = 2,
) -> Attention:  # fmt: skip
    """An attention; names in place of `rows`, `keys` and `batch` leave these open."""
    named = sorted({x for x in (batch, rows, keys) if isinstance(x, str)})
    text = TEXT.format(
        sizes=", ".join(named), B=batch, H=heads, G=kv, N=rows, M=keys, D=d, E=e, dtype=dtype, score=score, mask=mask,
        empty=empty, tensors="".join(f"tensor {x}\n" for x in tensors.split("; ") if x),
        head="h" if kv == heads else f"h // {heads // kv}", sink=f"sink   {sink}\n" if sink else "",
    )  # fmt: skip
    return parse_attention(re.sub(r"^size   \n", "", text, flags=re.MULTILINE))


def model_of(a: Attention, rows: Sequence[Row], opset: int = 24) -> tuple[str, bytes]:
    """(operator, a model of it). Operands come as projections give them, and are turned in the model."""
    nodes = Nodes("n")
    given: list[ir.Value] = []
    values: list[Value] = []
    sizes: dict[Any, Any] = {}
    for t in a.tensors:
        shape = [int(n.value) if isinstance(n, Const) else n.name for n in t.shape]
        turned = t.name in "qkv"
        own = [shape[0], shape[2], shape[1], shape[3]] if turned else shape
        x = ir.Value(name=t.name, shape=ir.Shape(own), type=ir.TensorType(TYPES[DTYPE_OF[t.dtype]]))
        given.append(x)
        value = Value(nodes, x, DTYPE_OF[t.dtype], tuple(n if isinstance(n, int) else None for n in own))
        value = value.permute(0, 2, 1, 3) if turned else value
        for at, n in enumerate(t.shape):
            if not isinstance(n, Const) and n not in sizes:
                sizes[n] = value.extent(at)
        values.append(Value(nodes, value.value, value.dtype, tuple(
            int(n.value) if isinstance(n, Const) else sizes[n] for n in t.shape
        )))  # fmt: skip
    before = list(nodes.made)
    nodes.made.clear()  # operands were there before
    name, out = attention(a, values, sizes, rows, opset)
    out.value.name = "y"
    graph = ir.Graph(given, [out.value], nodes=[*before, *nodes.made], opset_imports={"": opset, "com.microsoft": 1})
    model = ir.Model(graph, ir_version=11)
    RemoveUnusedNodesPass()(model)
    return name, ir.to_proto(model).SerializeToString()


def run(model: bytes, feed: Mapping[str, torch.Tensor], folder: Path) -> tuple[torch.Tensor, list[str]]:
    """(the output, the operators that onnxruntime runs for it)."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.optimized_model_filepath = str(folder / "ran.onnx")
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    out = session.run(["y"], {n: x.numpy() for n, x in feed.items()})[0]
    return torch.from_numpy(out), [n.op_type for n in onnx.load(folder / "ran.onnx").graph.node]
