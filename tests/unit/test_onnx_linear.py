"""Linear attentions as `LinearAttention`: onnxruntime's own operator, which is one kernel, and the standard one of
opset 27, against the recurrence in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")
ort = pytest.importorskip("onnxruntime")

from attentions import linear_forms  # noqa: E402

from attncc.codegen.onnx import Inexpressible, Nodes, Value  # noqa: E402
from attncc.codegen.onnx.linear import linear, logarithm  # noqa: E402
from attncc.codegen.onnx.onnxruntime import DOMAIN  # noqa: E402
from attncc.ir import Linear, Load, Size  # noqa: E402
from attncc.ir.build import const, op  # noqa: E402
from attncc.ir.evaluate import DTYPE_OF  # noqa: E402
from attncc.ir.interpret_linear import interpret_linear  # noqa: E402

FORMS = ["bare", "retention", "gated", "by_channel", "delta", "gated_delta", "delta_by_channel", "packed", "features",
         "grouped"]  # fmt: skip
KINDS = {torch.float32: ir.DataType.FLOAT, torch.int64: ir.DataType.INT64}


def session(a: Linear, domain: str, folder: Any) -> tuple[Any, list[str]]:
    nodes = Nodes("n")
    given: list[Any] = []
    values: list[Value] = []
    sizes: dict[Any, Any] = {}
    for t in a.tensors:
        shape = [n.name if isinstance(n, Size) else int(n.value) for n in t.shape]
        dtype = DTYPE_OF[t.dtype]
        given.append(ir.Value(name=t.name, shape=ir.Shape(shape), type=ir.TensorType(KINDS[dtype])))
        value = Value(nodes, given[-1], dtype, tuple(n if isinstance(n, int) else None for n in shape))
        for at, n in enumerate(t.shape):
            if isinstance(n, Size) and n not in sizes:
                sizes[n] = value.extent(at)
        held = tuple(sizes[n] if isinstance(n, Size) else int(n.value) for n in t.shape)
        values.append(Value(nodes, given[-1], dtype, held))
    found = linear(a, values, sizes, domain=domain, opset=27)
    for name, x in found.items():
        x.value.name = name
    graph = ir.Graph(given, [x.value for x in found.values()], nodes=nodes.made, opset_imports={"": 27, DOMAIN: 1})
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "ran.onnx")
    made = ort.InferenceSession(ir.to_proto(ir.Model(graph, ir_version=11)).SerializeToString(), options,
                                providers=["CPUExecutionProvider"])  # fmt: skip
    return made, [n.op_type for n in ir.load(folder / "ran.onnx").graph]


@pytest.mark.parametrize("domain", [DOMAIN, ""], ids=["onnxruntime", "standard"])
@pytest.mark.parametrize("form", FORMS)
def test_the_operator_computes_the_recurrence(form: str, domain: str, tmp_path: Any) -> None:
    n: int | Size = 37 if form != "gated" else Size("N")
    a = linear_forms.FORMS[form](linear_forms.plain(2, 4, n, 8, 16))
    run, ran = session(a, domain, tmp_path)
    assert "LinearAttention" in ran if domain else "Scan" in ran  # no kernel in version 1.32: it is taken apart
    for tokens in (37,) if isinstance(n, int) else (5, 70):
        given = linear_forms.data(a, tokens) if isinstance(n, Size) else linear_forms.data(a)
        sizes = [tokens] if isinstance(n, Size) else []
        wanted = interpret_linear(a, given, sizes, compute=torch.float64)
        found = run.run(None, {k: x.numpy() for k, x in given.items()})
        for name, x in zip(a.outputs, found, strict=True):
            torch.testing.assert_close(torch.from_numpy(x).double(), wanted[name], atol=2e-4, rtol=1e-4)


def test_what_it_does_not_compute() -> None:
    with pytest.raises(Inexpressible, match="two products"):
        session(linear_forms.for_all(linear_forms.plain(2, 4, 8, 8, 8)), DOMAIN, None)
    a = linear_forms.plain(2, 4, 8, 8, 8)
    with pytest.raises(Inexpressible, match="opset 27"):
        linear(a, [], {}, domain="", opset=25)
    g = Load("g", (), "float")
    assert logarithm(g) is None and logarithm(op("exp", g)) is g and logarithm(const(-1.0)) is None
