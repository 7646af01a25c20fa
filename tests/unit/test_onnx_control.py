"""Graphs inside of a graph: `If`, `Loop`, `Scan` against onnxruntime, and attentions found and rewritten in them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")
ort = pytest.importorskip("onnxruntime")

import onnx_ir as ir  # noqa: E402
import torch  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from attncc.convert.convert import Wish, convert  # noqa: E402
from attncc.convert.onnx_files import exported  # noqa: E402
from attncc.frontends.onnx.running import OnnxModule  # noqa: E402
from attncc.frontends.targets import TargetError  # noqa: E402

FLOAT, BOOL, INT = TensorProto.FLOAT, TensorProto.BOOL, TensorProto.INT64
value, node = helper.make_tensor_value_info, helper.make_node


def model(nodes: list[Any], inputs: list[Any], outputs: list[Any], data: dict[str, Any] | None = None) -> Any:
    held = [numpy_helper.from_array(np.asarray(x), n) for n, x in (data or {}).items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def attention(x: str, out: str, prefix: str) -> list[Any]:
    """softmax(x w xT) x, w from the graph around."""
    p = prefix
    return [
        node("MatMul", [x, "w"], [f"{p}q"]), node("Transpose", [x], [f"{p}t"], perm=[0, 2, 1]),
        node("MatMul", [f"{p}q", f"{p}t"], [f"{p}s"]), node("Softmax", [f"{p}s"], [f"{p}p"], axis=-1),
        node("MatMul", [f"{p}p", x], [out]),
    ]  # fmt: skip


W = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32) / 2


def branches() -> Any:
    """One of two attentions, or none of it: the longer branch keeps another length."""
    yes = helper.make_graph([*attention("x", "one", "a/"), node("Relu", ["one"], ["yes"])], "yes", [],
                            [value("yes", FLOAT, None)])  # fmt: skip
    no = helper.make_graph([*attention("x", "two", "b/"), node("Neg", ["two"], ["no"])], "no", [],
                           [value("no", FLOAT, None)])  # fmt: skip
    both = [node("If", ["c"], ["y"], then_branch=yes, else_branch=no)]
    inputs = [value("c", BOOL, []), value("x", FLOAT, ["b", "n", 4])]
    return model(both, inputs, [value("y", FLOAT, ["b", "n", 4])], {"w": W})


def loop(turns: bool) -> Any:
    """The same attention again and again, as often as the file says, or as an input does."""
    body = helper.make_graph(
        [*attention("now", "next", "t/"), node("Identity", ["more"], ["again"])], "body",
        [value("at", INT, []), value("more", BOOL, []), value("now", FLOAT, None)],
        [value("again", BOOL, []), value("next", FLOAT, None)],
    )  # fmt: skip
    inputs = [value("x", FLOAT, ["b", "n", 4]), *([] if turns else [value("m", INT, [])])]
    data = {"w": W, "go": np.array(True)} | ({"m": np.array(3)} if turns else {})
    return model([node("Loop", ["m", "go", "x"], ["y"], body=body)], inputs, [value("y", FLOAT, ["b", "n", 4])], data)


def until() -> Any:
    """A loop that data ends: doubled until the sum is more than 100."""
    body = helper.make_graph(
        [node("Add", ["now", "now"], ["next"]), node("ReduceSum", ["next"], ["s"], keepdims=0),
         node("Less", ["s", "limit"], ["again"])], "body",
        [value("at", INT, []), value("more", BOOL, []), value("now", FLOAT, [3])],
        [value("again", BOOL, []), value("next", FLOAT, [3])],
    )  # fmt: skip
    data = {"limit": np.float32(100), "go": np.array(True)}
    return model([node("Loop", ["", "go", "x"], ["y"], body=body)], [value("x", FLOAT, [3])],
                 [value("y", FLOAT, [3])], data)  # fmt: skip


def stacked() -> Any:
    """A loop that gives something of every turn, as many as a dimension says."""
    body = helper.make_graph(
        [node("Add", ["now", "x"], ["next"]), node("Mul", ["next", "next"], ["each"]),
         node("Identity", ["more"], ["again"])], "body",
        [value("at", INT, []), value("more", BOOL, []), value("now", FLOAT, ["n", 4])],
        [value("again", BOOL, []), value("next", FLOAT, ["n", 4]), value("each", FLOAT, ["n", 4])],
    )  # fmt: skip
    nodes = [node("Shape", ["x"], ["shape"]), node("Gather", ["shape", "zero"], ["m"], axis=0),
             node("Loop", ["m", "go", "x"], ["y", "every"], body=body)]  # fmt: skip
    return model(nodes, [value("x", FLOAT, ["n", 4])], [value("y", FLOAT, ["n", 4]), value("every", FLOAT, None)],
                 {"zero": np.array(0), "go": np.array(True)})  # fmt: skip


def scanned() -> Any:
    """A recurrence over the second dimension, backwards."""
    body = helper.make_graph(
        [node("Mul", ["state", "half"], ["less"]), node("Add", ["less", "x_t"], ["new"]),
         node("Tanh", ["new"], ["each"])], "body", [value("state", FLOAT, ["b"]), value("x_t", FLOAT, ["b"])],
        [value("new", FLOAT, ["b"]), value("each", FLOAT, ["b"])],
    )  # fmt: skip
    nodes = [node("Scan", ["h", "x"], ["last", "every"], body=body, num_scan_inputs=1, scan_input_axes=[1],
                  scan_input_directions=[1], scan_output_axes=[1], scan_output_directions=[1])]  # fmt: skip
    return model(nodes, [value("h", FLOAT, ["b"]), value("x", FLOAT, ["b", "n"])],
                 [value("last", FLOAT, ["b"]), value("every", FLOAT, ["b", "n"])],
                 {"half": np.float32(0.5)})  # fmt: skip


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


CASES: dict[str, tuple[Any, list[dict[str, Any]]]] = {
    "if": (branches(), [{"c": np.array(c), "x": numbers(2, n, 4)} for c in (True, False) for n in (3, 5)]),
    "loop": (loop(True), [{"x": numbers(2, 3, 4)}]),
    "loop-turns": (loop(False), [{"x": numbers(2, 3, 4), "m": np.array(m)} for m in (0, 1, 4)]),
    "loop-until": (until(), [{"x": np.abs(numbers(3)) * by} for by in (1, 90)]),
    "loop-stacked": (stacked(), [{"x": numbers(n, 4)} for n in (3, 6)]),
    "scan": (scanned(), [{"h": numbers(2), "x": numbers(2, n)} for n in (4, 7)]),
}


def wanted(m: Any, fed: dict[str, Any]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(m.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, fed)


@pytest.mark.parametrize("name", CASES)
def test_run_in_torch(name: str) -> None:
    m, feeds = CASES[name]
    module = OnnxModule(ir.from_proto(m))
    for fed in feeds:
        found = module(*(torch.from_numpy(x.copy()) for x in fed.values()))
        for x, y in zip(wanted(m, fed), found, strict=True):
            np.testing.assert_allclose(y.numpy(), x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_exported(name: str, tmp_path: Path) -> None:
    """The program holds for all data, and for sizes that the file leaves open."""
    m, feeds = CASES[name]
    onnx.save(m, tmp_path / "in.onnx")
    program = exported(str(tmp_path / "in.onnx"))
    for fed in feeds:
        found = program.module()(*(torch.from_numpy(x.copy()) for x in fed.values()))
        for x, y in zip(wanted(m, fed), found, strict=True):
            np.testing.assert_allclose(y.numpy(), x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "sites"), [("if", 2), ("loop", 1), ("loop-turns", 1)])
def test_attentions_inside_are_rewritten(name: str, sites: int, tmp_path: Path) -> None:
    m, feeds = CASES[name]
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(m, source)
    done = convert(Wish(str(source), out, "onnx", measure=False))
    assert done.report.fused == len(done.report.sites) == sites
    new = onnx.load(out)
    assert [n.op_type for n in new.graph.node] == [n.op_type for n in m.graph.node]  # the graph around is as it was
    inner = [n.op_type for g in graphs(new) for n in g.node]
    assert inner.count("Attention") == sites and "Softmax" not in inner
    for fed in feeds:
        for x, y in zip(wanted(m, fed), wanted(new, fed), strict=True):
            np.testing.assert_allclose(y, x, rtol=1e-4, atol=1e-5)


def graphs(m: Any) -> list[Any]:
    return [a.g for n in m.graph.node for a in n.attribute if a.type == onnx.AttributeProto.GRAPH]


def test_an_attention_across_the_bounds_stays(tmp_path: Path) -> None:
    """Weights of a branch, the values outside of it: nothing inside of a branch can be read from outside."""
    nodes = attention("x", "y", "a/")
    yes = helper.make_graph([*nodes[:4], node("Identity", ["a/p"], ["yes"])], "yes", [], [value("yes", FLOAT, None)])
    no = helper.make_graph([node("MatMul", ["x", "ones"], ["no"])], "no", [], [value("no", FLOAT, None)])
    outer = [node("If", ["c"], ["p"], then_branch=yes, else_branch=no), node("MatMul", ["p", "x"], ["y"])]
    m = model(outer, [value("c", BOOL, []), value("x", FLOAT, [2, 3, 4])], [value("y", FLOAT, [2, 3, 4])],
              {"w": W, "ones": np.ones((4, 3), np.float32)})  # fmt: skip
    onnx.save(m, tmp_path / "in.onnx")
    done = convert(Wish(str(tmp_path / "in.onnx"), tmp_path / "out.onnx", "onnx", measure=False))
    assert [s.status for s in done.report.sites] == ["refused"] or done.report.fused == 0
    assert all(s.reason for s in done.report.sites) and done.report.sites


def test_what_torch_cannot_say(tmp_path: Path) -> None:
    """A loop that data ends and that gives something of every turn: one line."""
    m = until()
    body = m.graph.node[0].attribute[0].g
    body.node.append(node("Identity", ["next"], ["each"]))
    body.output.append(value("each", FLOAT, [3]))
    m.graph.node[0].output.append("every")
    m.graph.output.append(value("every", FLOAT, ["n", 3]))
    onnx.save(m, tmp_path / "in.onnx")
    with pytest.raises(TargetError, match="only the data says how many turns"):
        exported(str(tmp_path / "in.onnx"))


def domains(graph: Any) -> set[str]:
    """Of the operators of a graph and of those inside of it."""
    inner = [a.g for n in graph.node for a in n.attribute if a.type == onnx.AttributeProto.GRAPH]
    return {n.domain for n in graph.node}.union(*map(domains, inner))


def test_a_file_names_the_domains_of_operators_inside_of_graphs(tmp_path: Path) -> None:
    onnx.save(branches(), tmp_path / "in.onnx")
    convert(Wish(str(tmp_path / "in.onnx"), tmp_path / "out.onnx", "onnx", measure=False, target="onnxruntime+attncc"))
    written = onnx.load(tmp_path / "out.onnx")
    assert len(domains(written.graph)) > 1
    assert domains(written.graph) <= {x.domain for x in written.opset_import}
