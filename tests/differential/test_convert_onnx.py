"""ONNX to ONNX: attentions spelled in primitives become the operator, everything else stays, results are equal."""

import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")
ort = pytest.importorskip("onnxruntime")

import torch  # noqa: E402
from onnx import helper, numpy_helper  # noqa: E402
from onnx.backend.test.loader import load_model_tests  # noqa: E402

from attncc.convert import onnx_files  # noqa: E402
from attncc.convert.checking import CheckError, check  # noqa: E402
from attncc.convert.convert import Wish, convert  # noqa: E402
from attncc.convert.exported import rewritten  # noqa: E402
from attncc.convert.onnx_files import Session, exported  # noqa: E402
from attncc.convert.portable import portable_form  # noqa: E402
from attncc.frontends.targets import TargetError  # noqa: E402
from attncc.ir.reasons import because  # noqa: E402

FLOAT = onnx.TensorProto.FLOAT


def constant(name: str, x: Any) -> Any:
    return numpy_helper.from_array(np.asarray(x), name)


def spelled(mask: str = "", *, opset: int = 14, heads: int = 2, batch: Any = "batch", length: Any = "length") -> Any:
    """An attention in primitives: x (batch, length, 16) times one layer, split into heads, and back."""
    random = np.random.default_rng(0)
    data = [
        constant("w", random.standard_normal((16, 48)).astype(np.float32)),
        constant("heads", [0, 0, 3, heads, 16 // heads]),
        constant("whole", [0, 0, 16]), constant("scale", np.float32(0.3)), constant("axis", [0]),
        constant("low", np.float32(-1e9)), constant("zero", np.int64(0)), constant("one", np.int64(1)),
    ]  # fmt: skip
    data += [constant(f"at{n}", np.int64(n)) for n in (0, 1, 2)]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["qkv"]), helper.make_node("Reshape", ["qkv", "heads"], ["split"]),
        helper.make_node("Transpose", ["split"], ["parts"], perm=[2, 0, 3, 1, 4]),
        *(helper.make_node("Gather", ["parts", f"at{n}"], [name], axis=0) for n, name in enumerate("qkv")),
        helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]), helper.make_node("MatMul", ["q", "kt"], ["s"]),
        helper.make_node("Mul", ["s", "scale"], ["scaled"]),
    ]  # fmt: skip
    inputs = [helper.make_tensor_value_info("x", FLOAT, [batch, length, 16])]
    scores = "scaled"
    if mask == "causal":
        nodes += [
            helper.make_node("Shape", ["x"], ["shape"]), helper.make_node("Gather", ["shape", "one"], ["n"], axis=0),
            helper.make_node("Range", ["zero", "n", "one"], ["at"]), helper.make_node("Unsqueeze", ["at",
            "minus"], ["rows"]),
            helper.make_node("LessOrEqual", ["at", "rows"], ["seen"]),
            helper.make_node("Where", ["seen", "scaled", "low"], ["masked"]),
        ]  # fmt: skip
        data.append(constant("minus", [1]))
        scores = "masked"
    if mask == "stored":
        lowest = np.where(np.tril(np.ones((length, length))) > 0, 0, np.finfo(np.float32).min)
        data.append(constant("stored", lowest.astype(np.float32)))
        nodes.append(helper.make_node("Add", ["scaled", "stored"], ["masked"]))
        scores = "masked"
    if mask == "padding":
        inputs.append(helper.make_tensor_value_info("mask", onnx.TensorProto.INT64, [batch, length]))
        data += [constant("axes", [1, 2]), constant("unit", np.float32(1))]
        nodes += [
            helper.make_node("Unsqueeze", ["mask", "axes"], ["wide"]),
            helper.make_node("Cast", ["wide"], ["real"], to=FLOAT),
            helper.make_node("Sub", ["unit", "real"], ["hidden"]), helper.make_node("Mul", ["hidden",
            "low"], ["added"]),
            helper.make_node("Add", ["scaled", "added"], ["masked"]),
        ]  # fmt: skip
        scores = "masked"
    if mask == "seen":
        inputs.append(helper.make_tensor_value_info("mask", onnx.TensorProto.BOOL, [batch, length]))
        data += [constant("axes", [1, 2]), constant("hidden", np.float32(-np.inf))]
        nodes += [
            helper.make_node("Unsqueeze", ["mask", "axes"], ["wide"]),
            helper.make_node("Where", ["wide", "scaled", "hidden"], ["masked"]),
        ]
        scores = "masked"
    nodes += [
        helper.make_node("Softmax", [scores], ["weights"], axis=-1), helper.make_node("MatMul", ["weights",
        "v"], ["o"]),
        helper.make_node("Transpose", ["o"], ["back"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["back", "whole"], ["y"]),
    ]  # fmt: skip
    out = helper.make_tensor_value_info("y", FLOAT, [batch, length, 16])
    graph = helper.make_graph(nodes, "g", inputs, [out], data)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def ops(path: Path) -> Counter[str]:
    return Counter(n.op_type for n in onnx.load(path).graph.node)


@pytest.mark.parametrize("mask", ["", "causal", "padding"])
def test_primitives_become_the_operator(mask: str, tmp_path: Path) -> None:
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(spelled(mask), source)
    done = convert(Wish(str(source), out, "onnx", measure=False))
    assert done.report.fused == 1 and done.checked.startswith("checked on 3 sets")
    found = ops(out)
    assert found["Attention"] == 1 and found["Softmax"] == 0 and found["MatMul"] == 1
    model = onnx.load(out)
    (node,) = [n for n in model.graph.node if n.op_type == "Attention"]
    assert len(node.input) == (4 if mask == "padding" else 3)
    assert any(a.name == "is_causal" and a.i == 1 for a in node.attribute) == (mask == "causal")
    assert {p.key for p in model.metadata_props} == {"attncc", "attncc.sites"}
    assert [x.name for x in model.graph.initializer if x.name == "w"] == ["w"]
    onnx.checker.check_model(model)


def test_a_stored_mask_becomes_the_flag(tmp_path: Path) -> None:
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(spelled("stored", length=6), source)
    assert convert(Wish(str(source), out, "onnx", measure=False)).report.sites[0].mask == "j <= i"
    (node,) = [n for n in onnx.load(out).graph.node if n.op_type == "Attention"]
    assert len(node.input) == 3
    assert not [x for x in onnx.load(out).graph.initializer if x.name == "stored"]


def test_nothing_is_written_where_results_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from attncc.codegen.onnx.nodes import Nodes  # noqa: PLC0415

    call = Nodes.call

    def wrong(self: Any, op: str, inputs: Any, dtype: Any, shape: Any, **how: Any) -> Any:
        return call(self, op, inputs, dtype, shape, **({"scale": 9.0} if op == "Attention" else how))

    monkeypatch.setattr(Nodes, "call", wrong)
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(spelled(), source)
    with pytest.raises(CheckError, match="differs most at"):
        convert(Wish(str(source), out, "onnx", measure=False))
    assert [x.name for x in tmp_path.iterdir()] == ["in.onnx"]


def test_a_file_without_attention_stays_as_it_is(tmp_path: Path) -> None:
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    model = spelled()
    del model.graph.node[1:]
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("qkv", FLOAT, ["batch", "length", 48]))
    onnx.save(model, source)
    done = convert(Wish(str(source), out, "onnx"))
    assert done.report.sites == () and "as it was" in done.report.notes[0]
    assert onnx.load(out).opset_import == model.opset_import


def test_to_a_torch_program(tmp_path: Path) -> None:
    source = tmp_path / "in.onnx"
    onnx.save(spelled("padding"), source)
    program = exported(str(source))
    made = rewritten(program, kernels=False, form=portable_form)
    assert [s.status for s in made.found.sites] == ["fused"]
    assert program.example_inputs is not None
    check(program.module(), made.program.module(), [program.example_inputs])
    check(Session(source), made.program.module(), [program.example_inputs])


@pytest.mark.parametrize(
    ("wish", "says"),
    [({"dynamic": ("batch",)}, "which of its dimensions"), ({"plan": Path("p.json")}, "a plan speaks of the modules")],
    ids=["dynamic", "plan"],
)
def test_what_does_not_go_with_onnx(wish: dict[str, Any], says: str, tmp_path: Path) -> None:
    source = tmp_path / "in.onnx"
    onnx.save(spelled(), source)
    with pytest.raises((TargetError, RuntimeError), match=says):
        convert(Wish(str(source), tmp_path / "out.onnx", "onnx", **wish))


#: Conformance cases whose scores are an output, too, or whose dtype onnxruntime has no kernel for, stay as they are.
NAMES = ["test_attention_4d_expanded", "test_attention_4d_gqa_causal_expanded", "test_attention_3d_softcap_expanded",
         "test_attention_4d_attn_mask_bool_expanded", "test_attention_local_window_with_past_expanded",
         "test_attention_4d_gqa_with_past_and_present_fp16_expanded",
         "test_flexattention_gqa_expanded_ver26"]  # fmt: skip


def conformance() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = load_model_tests(kind="node")
    return {t.name: t.model for t in found if t.name.startswith(("test_attention",
        "test_flexattention")) and "expanded" in t.name}


def save(model: Any, path: Path) -> str:
    onnx.save(model, path)
    return str(path)


@pytest.mark.slow
def test_conformance_cases(tmp_path: Path) -> None:
    cases = conformance()
    for name in NAMES:
        out = tmp_path / "out.onnx"
        done = convert(Wish(save(cases[name], tmp_path / "in.onnx"), out, "onnx", measure=False))
        assert done.report.fused == 1, name
        assert ops(out)["Attention"] == 1, name


@pytest.mark.full
def test_every_conformance_case(tmp_path: Path) -> None:
    """All are recognised; those that stay have one of three reasons."""
    kept: Counter[str] = Counter()
    fused = 0
    for name, model in conformance().items():
        done = convert(Wish(save(model, tmp_path / "in.onnx"), tmp_path / "out.onnx", "onnx", measure=False))
        assert len(done.report.sites) == 1, name
        fused += done.report.fused
        kept.update(s.reason.rpartition(": ")[2] for s in done.report.sites if s.status != "fused")
    assert fused >= 78, kept
    assert kept["its weights are needed by the output"] + kept["onnxruntime has no kernel for bf16"] >= 20


def test_the_conformance_cases_are_all_that_there_are() -> None:
    """Every expanded case of an operator of attention is one of those above, or of linear attention below."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [t.name for t in load_model_tests(kind="node") if "attention" in t.name and "expanded" in t.name]
    assert len(found) == len(conformance()) + len([n for n in found if "linear" in n])
    assert len(conformance()) >= 104 and not set(NAMES) - set(found)


@pytest.mark.full
@pytest.mark.parametrize("target", ["onnx", "onnxruntime"])
def test_every_case_of_linear_attention(target: Any, tmp_path: Path) -> None:
    """They are recurrences over the turns of a Scan, and become the operator again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        every = load_model_tests(kind="node")
    cases = [t.model for t in every if "linear_attention" in t.name and "expanded" in t.name]
    assert len(cases) >= 14
    for model in cases:
        out = tmp_path / "out.onnx"
        wish = Wish(save(model, tmp_path / "in.onnx"), out, "onnx", measure=False, target=target)
        done = convert(wish)
        assert [s.became for s in done.report.sites] == ["LinearAttention"] and done.checked.startswith("checked")
        assert ops(out)["LinearAttention"] == 1 and not ops(out)["Scan"]


class Layer(torch.nn.Module):
    """A layer as models write it, for torch's exporters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = torch.nn.Linear(32, 96), torch.nn.Linear(32, 32)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, 4, 8).permute(2, 0, 3, 1, 4)
        s = q @ k.transpose(-1, -2) / 8**0.5
        causal = torch.ones(n, n, dtype=torch.bool).tril()
        s = s.masked_fill(~causal, torch.finfo(s.dtype).min) + (1.0 - mask[:, None, None, :].float()) * -1e9
        return self.out((s.softmax(-1) @ v).transpose(1, 2).reshape(b, n, 32))


@pytest.mark.full
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("new", "opset"), [(False, 14), (False, 17), (True, 18), (True, 23)])
def test_files_of_both_exporters(new: bool, opset: int, dynamic: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    args = torch.randn(2, 10, 32), torch.ones(2, 10, dtype=torch.long)
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    if new:
        torch.onnx.export(Layer().eval(), args, str(source), dynamo=True, opset_version=opset, verbose=False,
                          dynamic_shapes=(axes, axes) if dynamic else None)  # fmt: skip
    else:
        names = {0: "batch", 1: "length"}
        torch.onnx.export(Layer().eval(), args, str(source), dynamo=False, opset_version=opset, input_names=["x",
            "mask"],
                          dynamic_axes={"x": names, "mask": names} if dynamic else None)  # fmt: skip
    done = convert(Wish(str(source), out, "onnx", measure=False))
    assert done.report.fused == 1, done.report.sites
    assert ops(out)["Attention"] == 1


def test_layers_share_their_mask(tmp_path: Path) -> None:
    """Two layers, one padding mask: what it is made of is computed once."""
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    model = spelled("padding")
    nodes = list(model.graph.node)
    first = [n for n in nodes if n.output[0] in ("wide", "real", "hidden", "added")]
    model.graph.node[-1].output[0] = "between"
    for n in nodes:
        if n in first:
            continue
        again = onnx.NodeProto()
        again.CopyFrom(n)
        given = {x.name for x in model.graph.initializer} | {"added", "x"}
        again.input[:] = ["between" if x == "x" else x if x in given else f"{x}_2" for x in n.input]
        again.output[:] = ["y" if n.output[0] == "between" else f"{n.output[0]}_2"]
        model.graph.node.append(again)
    # -1e9 is a number that is added, and the lowest float hides: only that is a mask
    lowest = numpy_helper.from_array(np.float32(np.finfo(np.float32).min), "low")
    next(x for x in model.graph.initializer if x.name == "low").CopyFrom(lowest)
    onnx.save(model, source)
    done = convert(Wish(str(source), out, "onnx", measure=False))
    assert done.report.fused == 2
    attentions = [n for n in onnx.load(out).graph.node if n.op_type == "Attention"]
    assert len(attentions) == 2 and attentions[0].input[3] == attentions[1].input[3]


class Buckets(torch.nn.Module):
    """A learned bias by the distance of a key, as in T5."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.bias = torch.nn.Linear(32, 96), torch.nn.Embedding(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, 4, 8).permute(2, 0, 3, 1, 4)
        at = torch.arange(n)
        far = (at[None] - at[:, None]).abs()
        buckets = 8 + (torch.log(far.clamp(min=1).float() / 8) / 2.8 * 8).to(torch.long)
        bias = self.bias(torch.where(far < 8, far, buckets.clamp(max=15))).permute(2, 0, 1)[None]
        return ((q @ k.transpose(-1, -2) + bias).softmax(-1) @ v).transpose(1, 2).reshape(b, n, 32)


@pytest.mark.slow
def test_a_bias_by_distance_with_an_open_length(tmp_path: Path) -> None:
    """The reader's own table of distances is no node of the file: the bias is read as the file has it."""
    pytest.importorskip("onnxscript")
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    torch.onnx.export(Buckets().eval(), (torch.randn(2, 10, 32),), str(source), dynamo=True, opset_version=18,
                      verbose=False, dynamic_shapes=(axes,))  # fmt: skip
    assert convert(Wish(str(source), out, "onnx", measure=False)).report.fused == 1
    assert ops(out)["Attention"] == 1


RUNTIME = {"": "MultiHeadAttention", "causal": "GroupQueryAttention", "seen": "MultiHeadAttention"}


@pytest.mark.parametrize("mask", RUNTIME)
def test_operators_of_onnxruntime(mask: str, tmp_path: Path) -> None:
    """Written where they are asked for, named in the file, and without a Transpose that another undoes."""
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(spelled(mask), source)
    done = convert(Wish(str(source), out, "onnx", measure=False, target="onnxruntime"))
    assert done.report.fused == 1 and done.checked.startswith("checked on 3 sets")
    assert [s.became for s in done.report.sites] == [RUNTIME[mask]]
    model = onnx.load(out)
    assert {x.domain: x.version for x in model.opset_import} == {"": 23, "com.microsoft": 1}
    said = {p.key: p.value for p in model.metadata_props}
    assert f"1 as {RUNTIME[mask]}" in said["attncc"] and json.loads(said["attncc.sites"])[0]["became"] == RUNTIME[mask]
    found = ops(out)
    assert found[RUNTIME[mask]] == 1 and found["Softmax"] == 0
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "ran.onnx")
    ort.InferenceSession(str(out), options, providers=["CPUExecutionProvider"])
    assert ops(tmp_path / "ran.onnx")["Transpose"] <= 4  # what splits the projection, and q, k and v laid flat


def test_slower_operators_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where onnxruntime's own are slower the standard ones are tried, and then the file stays as it was."""
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(spelled("causal"), source)
    answers = iter([because("slower", "1"), None])
    monkeypatch.setattr(onnx_files, "_slower", lambda *_: next(answers))
    done = convert(Wish(str(source), out, "onnx", target="onnxruntime"))
    assert ops(out)["Attention"] == 1 and done.report.notes[0].startswith("written for onnx: ")
    answers = iter([because("slower", "1"), because("slower", "2")])
    done = convert(Wish(str(source), out, "onnx", target="onnxruntime"))
    assert not ops(out)["Attention"] and done.report.kept == 1


@pytest.mark.parametrize("opset", [23, 24, 25])
def test_the_opset_is_the_one_that_was_asked_for(opset: int, tmp_path: Path) -> None:
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(spelled("padding"), source)
    assert convert(Wish(str(source), out, "onnx", measure=False, opset=opset)).checked
    model = onnx.load(out)
    assert [(x.domain, x.version) for x in model.opset_import] == [("", opset)]
    onnx.checker.check_model(model, full_check=True)
