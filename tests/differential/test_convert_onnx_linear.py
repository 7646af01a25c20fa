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


def recurrent(*, turned: bool = False, squashed: bool = False, backwards: bool = False, decayed: float = 0.0) -> Any:
    """The gated delta rule over the turns of a Scan, batch and tokens open, four heads of queries on two of keys; the
    state `turned`: (b, h, e, d). What makes it something else: a value that is `squashed`, tokens from the last to the
    first, a state that is decayed once more."""
    state = "bhed" if turned else "bhde"
    nodes = [
        helper.make_node("Exp", ["g"], ["decay"]), helper.make_node("Unsqueeze", ["decay", "last"], ["decay_last"]),
        helper.make_node("Unsqueeze", ["decay_last", "last"], ["wide"]),
        helper.make_node("Mul", ["wide", "s"], ["kept"]),
        helper.make_node("Einsum", ["kept", "k"], ["held"], equation=f"{state},bhd->bhe"),
        helper.make_node("Tanh" if squashed else "Identity", ["v"], ["w"]),
        helper.make_node("Sub", ["w", "held"], ["u"]),
        helper.make_node("Mul", ["u", "beta"], ["change"]),
        helper.make_node("Einsum", ["k", "change"], ["outer"], equation=f"bhd,bhe->{state}"),
        helper.make_node("Mul", ["kept", "again"], ["less"]),
        helper.make_node("Add", ["less" if decayed else "kept", "outer"], ["new"]),
        helper.make_node("Unsqueeze", ["new", "two"], ["five"]),
        helper.make_node("Expand", ["five", "groups"], ["each"]),
        helper.make_node("Reshape", ["each", "heads"], ["whole"]),
        helper.make_node("Einsum", ["q", "whole"], ["o"], equation=f"bhd,{state}->bhe"),
        helper.make_node("Mul", ["o", "scale"], ["out"]),
    ]  # fmt: skip
    names = {"s": ["batch", 2, 6, 8] if not turned else ["batch", 2, 8, 6], "q": ["batch", 4, 6], "k": ["batch", 2, 6],
             "v": ["batch", 2, 8], "g": ["batch", 2], "beta": ["batch", 2, 1]}  # fmt: skip
    inner = [helper.make_tensor_value_info(n, FLOAT, shape) for n, shape in names.items()]
    outs = [helper.make_tensor_value_info(n, FLOAT, None) for n in ("new", "out")]
    body = helper.make_graph(nodes, "step", inner, outs)
    scan = helper.make_node("Scan", ["s0", *(f"{n}s" for n in list(names)[1:])], ["last_state", "outs"], body=body,
                            num_scan_inputs=5, scan_input_axes=[1] * 5, scan_output_axes=[1],
                            scan_input_directions=[int(backwards)] * 5)  # fmt: skip
    data = [constant("last", [-1]), constant("two", [2]), constant("groups", [1, 1, 2, 1, 1]),
            constant("heads", [-1, 4, *names["s"][2:]]), constant("scale", np.float32(0.3)),
            constant("again", np.float32(decayed))]  # fmt: skip
    given = [helper.make_tensor_value_info("s0", FLOAT, names["s"])] + [
        helper.make_tensor_value_info(f"{n}s", FLOAT, [shape[0], "tokens", *shape[1:]]) for n, shape in
        list(names.items())[1:]
    ]  # fmt: skip
    made = [helper.make_tensor_value_info(n, FLOAT, None) for n in ("last_state", "outs")]
    graph = helper.make_graph([scan], "g", given, made, data)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@pytest.mark.parametrize("turned", [False, True])
def test_a_recurrence_over_the_turns_of_a_scan(turned: bool, tmp_path: Path) -> None:
    """However the step is spelled: it is compared by its values."""
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(recurrent(turned=turned), source)
    done = convert(Wish(str(source), out, "onnx", measure=False, target="onnxruntime"))
    (site,) = done.report.sites
    assert site.equation == "S = exp(g) S + k rate * (v - (exp(g) S)^T k), out = 0.3 q S"
    assert site.became == "LinearAttention" and done.checked.startswith("checked on 3")
    assert ops(out)["LinearAttention"] == 1 and not ops(out)["Scan"]
    (kept,) = convert(Wish(str(source), out, "onnx", measure=False)).report.sites
    assert kept.status == "kept" and "opset 27" in kept.reason


@pytest.mark.parametrize("how", [{"squashed": True}, {"backwards": True}, {"decayed": 0.5}], ids=str)
def test_recurrences_that_are_none(how: Any, tmp_path: Path) -> None:
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(recurrent(**how), source)
    done = convert(Wish(str(source), out, "onnx", measure=False, target="onnxruntime"))
    assert [s.code for s in done.report.sites] == ["onnx-recurrence"] and ops(out)["Scan"] == 1
