"""Linear attention in ONNX files: as the operator of onnxruntime or of opset 27, or left as it is."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

from onnx import helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

from attncc.convert.convert import Wish, convert  # noqa: E402

FLOAT = onnx.TensorProto.FLOAT


def constant(name: str, x: Any) -> Any:
    return numpy_helper.from_array(np.asarray(x), name)


def ops(path: Path) -> Counter[str]:
    return Counter(n.op_type for n in onnx.load(path).graph.node)


def running_sums(normalised: bool, length: int = 12) -> Any:
    """Linear attention as its first authors wrote it: running sums of products, and of keys."""
    nodes = [
        helper.make_node("Elu", [x], [f"{x}_elu"]) for x in "qk"
    ] + [helper.make_node("Add", [f"{x}_elu", "unit"], [f"{x}_phi"]) for x in "qk"]
    nodes += [
        helper.make_node("Unsqueeze", ["k_phi", "last"], ["k_column"]),
        helper.make_node("Unsqueeze", ["v", "before"], ["v_row"]), helper.make_node("Mul", ["k_column",
        "v_row"], ["pairs"]), helper.make_node("CumSum", ["pairs", "tokens"], ["states"]),
        helper.make_node("Unsqueeze", ["q_phi", "before"], ["q_row"]),
        helper.make_node("MatMul", ["q_row", "states"], ["wide"]), helper.make_node("Squeeze", ["wide",
        "before"], ["sum"]),
    ]  # fmt: skip
    if normalised:
        nodes += [
            helper.make_node("CumSum", ["k_phi", "tokens"], ["keys"]), helper.make_node("Mul", ["q_phi",
            "keys"], ["products"]), helper.make_node("ReduceSum", ["products", "last"], ["weight"]),
            helper.make_node("Div", ["sum", "weight"], ["y"]),
        ]  # fmt: skip
    else:
        nodes[-1].output[0] = "y"
    data = [constant("unit", np.float32(1)), constant("last", [-1]), constant("before", [-2]),
            constant("tokens", np.int64(2))]  # fmt: skip
    given = [helper.make_tensor_value_info(x, FLOAT, ["batch", 2, length, 8]) for x in "qkv"]
    out = helper.make_tensor_value_info("y", FLOAT, ["batch", 2, length, 8])
    graph = helper.make_graph(nodes, "g", given, [out], data)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(("target", "opset"), [("onnxruntime", 23), ("onnx", 27)])
def test_linear_attention(target: Any, opset: int, normalised: bool, tmp_path: Path) -> None:
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(running_sums(normalised), source)
    done = convert(Wish(str(source), out, "onnx", measure=False, target=target, opset=opset))
    assert [s.became for s in done.report.sites] == ["LinearAttention"] and done.checked.startswith("checked on 3")
    found = ops(out)
    assert found["LinearAttention"] == 1 + normalised and not found["CumSum"]
    model = onnx.load(out)
    assert {x.domain: x.version for x in model.opset_import}[""] == opset
    if target == "onnx":  # the reference implementation of the operator itself
        onnx.checker.check_model(model)
        random = np.random.default_rng(0)
        feed = {x: random.standard_normal((2, 2, 12, 8)).astype(np.float32) for x in "qkv"}
        (given,) = ReferenceEvaluator(onnx.load(source)).run(None, feed)
        np.testing.assert_allclose(ReferenceEvaluator(model).run(None, feed)[0], given, rtol=1e-3, atol=1e-4)


def test_linear_attention_stays_where_there_is_no_operator(tmp_path: Path) -> None:
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(running_sums(False), source)
    (site,) = convert(Wish(str(source), out, "onnx", measure=False)).report.sites
    assert site.status == "kept" and "opset 27" in site.reason
