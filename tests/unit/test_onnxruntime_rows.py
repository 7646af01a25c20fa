"""The rows for onnxruntime: which operator takes what, that the installed version runs it as one, and that it computes
what the equation says in float64, rows that see nothing included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")
ort = pytest.importorskip("onnxruntime")

from onnx_nodes.attentions import model_of, run, written  # noqa: E402

from attncc.codegen.onnx import STANDARD, Inexpressible, Nodes, Value, attention  # noqa: E402
from attncc.codegen.onnx.onnxruntime import CPU, CUDA  # noqa: E402
from attncc.ir import Size, parse_attention  # noqa: E402
from attncc.ir.evaluate import DTYPE_OF  # noqa: E402
from attncc.ir.interpret import interpret  # noqa: E402

GQA, MHA, STD = "GroupQueryAttention", "MultiHeadAttention", "Attention"
LENGTHS = "lens: i64[2]"
PADDED = {"tensors": "seen: bool[2, 6]", "mask": "seen[b, j]"}
OPEN = {"batch": "B", "rows": "N", "keys": "N"}
#: What takes an attention, by name.
TAKEN: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": (MHA, {}), "cross": (MHA, {"rows": 3}), "wide-values": (MHA, {"e": 12}),
    "causal": (GQA, {"mask": "j <= i"}), "causal-grouped": (GQA, {"mask": "j <= i", "kv": 2}),
    "causal-window": (GQA, {"mask": "j <= i and i - j < 3", "kv": 2}),
    "causal-window-1": (GQA, {"mask": "i < j + 1 and j <= i"}),
    "causal-lengths": (GQA, {"mask": "j <= i and j < lens[b]", "tensors": LENGTHS}),
    "causal-lengths-nan": (GQA, {"mask": "j <= i and j < lens[b]", "tensors": LENGTHS, "empty": "nan"}),
    "causal-window-lengths": (STD, {"mask": "j <= i and i - j < 2 and j < lens[b]", "tensors": LENGTHS}),
    "causal-bias": (GQA, {"mask": "j <= i", "tensors": "slope: f32[4]",
                          "score": "s * 0.25 - float(i - j) * slope[h] * 0.02"}),
    "causal-sink": (GQA, {"mask": "j <= i", "sink": "logit[h]", "tensors": "logit: f32[4]"}),
    "causal-bias-sink": (GQA, {"mask": "j <= i", "sink": "logit[h]", "tensors": "logit: f32[4]",
                               "score": "s * 0.25 + float(j)"}),
    "causal-12": (MHA, {"mask": "j <= i", "d": 12, "e": 12}), "causal-wide": (MHA, {"mask": "j <= i", "e": 16}),
    "causal-12-grouped": (STD, {"mask": "j <= i", "d": 12, "e": 12, "kv": 2}),
    "causal-rows": (STD, {"mask": "j <= i", "rows": 3}),
    "causal-cache": (STD, {"mask": "j <= i + 3", "rows": 3, "kv": 2}),
    "padding-zero": (MHA, PADDED), "padding-mean": (MHA, PADDED | {"empty": "mean"}),
    "padding-nan": (MHA, PADDED | {"empty": "nan"}),
    "padding-bias": (MHA, PADDED | {"empty": "mean", "score": "s * 0.25 + float(i) * 0.1 - float(j)"}),
    "padding-grouped": (STD, PADDED | {"kv": 2}), "padding-grouped-mean": (STD, PADDED | {"kv": 2, "empty": "mean"}),
    "causal-padding-zero": (MHA, {"tensors": "seen: bool[2, 6]", "mask": "j <= i and seen[b, j]"}),
    "causal-padding-mean": (MHA, {"tensors": "seen: bool[2, 6]", "mask": "j <= i and seen[b, j]", "empty": "mean"}),
    "lengths": (MHA, {"mask": "j < lens[b]", "tensors": LENGTHS}),
    "lengths-mean": (MHA, {"mask": "j < lens[b]", "tensors": LENGTHS, "empty": "mean"}),
    "lengths-grouped": (STD, {"mask": "j < lens[b]", "tensors": LENGTHS, "kv": 2}),
    "lengths-grouped-nan": (STD, {"mask": "j < lens[b]", "tensors": LENGTHS, "kv": 2, "empty": "nan"}),
    "lengths-grouped-mean": (STD, {"mask": "j < lens[b]", "tensors": LENGTHS, "kv": 2, "empty": "mean"}),
    "lengths-and-padding": (MHA, {"mask": "j < lens[b] and seen[b, j]", "tensors": f"{LENGTHS}; seen: bool[2, 6]"}),
    "bias": (STD, {"score": "s * 0.25 - float(abs(i - j))"}), "grouped": (STD, {"kv": 2}),
    "window": (STD, {"mask": "abs(i - j) < 2"}), "pairs": (STD, {"mask": "m[i, j]", "tensors": "m: bool[6, 6]"}),
    "open": (GQA, OPEN | {"mask": "j <= i and j < lens[b]", "tensors": "lens: i64[B]"}),
    "open-causal": (GQA, OPEN | {"mask": "j <= i"}),
    "open-padding": (MHA, OPEN | {"mask": "seen[b, j]", "keys": "M", "tensors": "seen: bool[B, M]"}),
}  # fmt: skip
HALF = ["plain", "causal-grouped", "causal-window", "causal-lengths", "causal-bias", "causal-sink", "padding-mean",
        "lengths-grouped", "bias"]  # fmt: skip
#: Forms that are compared at a length of several tiles of a kernel too.
LONG = ["plain", "causal", "causal-grouped", "causal-window", "causal-lengths", "causal-bias", "causal-sink",
        "causal-padding-mean", "lengths", "padding-zero"]  # fmt: skip


def compare(
    how: dict[str, Any], rows: Any, dtype: str, folder: Path, operator: str, opset: int = 24, n: int = 6
) -> list[str]:
    sizes = {"B": 2, "N": n, "M": n}
    tensors_said = how.get("tensors", "").replace("f32", dtype).replace("2, 6]", f"2, {n}]")
    if n != 6:
        how = how | {"rows": n, "keys": n, "mask": how.get("mask", "True").replace("< 3", "< 70")}
    a = written(**(how | {"dtype": dtype, "tensors": tensors_said}))
    name, model = model_of(a, rows, opset)
    assert name == operator
    g = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for t in a.tensors:
        shape = [sizes[x.name] if isinstance(x, Size) else int(x.value) for x in t.shape]
        x = torch.randn(shape, generator=g).to(DTYPE_OF[t.dtype])
        if t.dtype == "bool":
            x = torch.rand(shape, generator=g) < 0.6
            x[0] = False  # the first sequence, or row, sees nothing
            x[1, -1] = True
        if t.dtype == "i64":
            x = torch.tensor([0, n - 2])  # the first sequence has no key
        tensors[t.name] = x
    wanted = interpret(a, tensors, [sizes[s.name] for s in a.sizes], compute=torch.float64)["out"]
    feed = {n: x.transpose(1, 2).contiguous() if n in "qkv" else x for n, x in tensors.items()}
    found, ran = run(model, feed, folder)
    assert found.dtype == DTYPE_OF[dtype] and found.shape == wanted.shape
    torch.testing.assert_close(found.double(), wanted, atol=3e-6 if dtype == "f32" else 4e-3, rtol=1e-5, equal_nan=True)
    return ran


@pytest.mark.parametrize("form", TAKEN)
def test_the_cpu_provider_runs_one_operator(form: str, tmp_path: Path) -> None:
    operator, how = TAKEN[form]
    ran = compare(how, CPU, "f32", tmp_path, operator)
    assert ran.count(operator) == 1 and "Softmax" not in ran and "MatMul" not in ran


@pytest.mark.parametrize("form", HALF)
def test_in_half_precision(form: str, tmp_path: Path) -> None:
    operator, how = TAKEN[form]
    ran = compare(how, CPU, "f16", tmp_path, operator)
    assert ran.count(operator) == 1 and "Softmax" not in ran


@pytest.mark.parametrize("opset", [23, 24])
@pytest.mark.parametrize("form", [n for n in TAKEN if "sink" not in n])
def test_the_standard_operator_computes_the_same(form: str, opset: int, tmp_path: Path) -> None:
    ran = compare(TAKEN[form][1], STANDARD, "f32", tmp_path, STD, opset)
    assert ran.count(STD) == 1 and "Softmax" not in ran


def test_nothing_of_rows_times_keys_is_made(tmp_path: Path) -> None:
    """Where a flag, a window, lengths or a mask of keys says what is hidden, no node gives as many elements."""
    held = [n for n, (operator, how) in TAKEN.items() if operator != STD and not {"bias", "open"} & {*n.split("-")}]
    assert len(held) >= 20
    for form in (*held, "lengths-grouped"):
        model = onnx.load_from_string(model_of(written(**TAKEN[form][1]), CPU)[1])
        inferred = onnx.shape_inference.infer_shapes(model)
        shapes = [[d.dim_value for d in v.type.tensor_type.shape.dim] for v in inferred.graph.value_info]
        assert shapes and not [s for s in shapes if s[-2:] == [6, 6]], form


@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("form", LONG)
def test_longer_sequences(form: str, dtype: str, tmp_path: Path) -> None:
    compare(TAKEN[form][1], CPU, dtype, tmp_path, TAKEN[form][0], n=150)


@pytest.mark.parametrize(
    ("how", "why"),
    [({"score": "5.0 * tanh(s * 0.2)"}, "capped"), ({"sink": "logit[h]", "tensors": "logit: f32[4]"}, "a sink")],
    ids=["capped", "sink"],
)
def test_what_the_nodes_are_better_at_stays(how: dict[str, Any], why: str) -> None:
    with pytest.raises(Inexpressible, match=why):
        model_of(written(**how), CPU)


@pytest.mark.parametrize(("dtype", "operator"), [("f32", MHA), ("f16", GQA), ("bf16", GQA)])
def test_what_the_cuda_provider_has_kernels_for(dtype: str, operator: str) -> None:
    """As onnxruntime's docs/OperatorKernels.md says: no GroupQueryAttention in float32, all in bfloat16."""
    assert model_of(written(mask="j <= i", dtype=dtype), CUDA)[0] == operator


def test_heads_lie_side_by_side_where_the_operands_do(tmp_path: Path) -> None:
    ran = compare(TAKEN["grouped"][1], CPU, "f32", tmp_path, STD)
    assert ran.count("Transpose") == 1  # that of the output, which a model turns back


SINGLE = """attention
batch  h = 4
axis   i = 6, j = 6, d = 8, e = 8
tensor q: f32[1, 4, 6, 8]
tensor k: f32[1, 2, 1, 6, 8]
tensor v: f32[1, 2, 1, 6, 8]
q      q[0, h, i, d]
k      k[0, h // 2, 0, j, d]
v      v[0, h // 2, 0, j, e]
score  s * 0.25
mask   j <= i
norm   softmax
empty  zero
weight w
give   out
dtype  f32
layout i, h, e
"""


def test_a_batch_of_one_keeps_its_heads() -> None:
    """The IR has no axis for it; operators do, and its heads are grouped still."""
    nodes = Nodes("n")
    a = parse_attention(SINGLE)
    shapes = {t.name: [int(n.value) for n in t.shape] for t in a.tensors}
    kind = ir.TensorType(ir.DataType.FLOAT)
    given = [ir.Value(name=n, shape=ir.Shape(s), type=kind) for n, s in shapes.items()]
    values = [Value(nodes, x, torch.float32, tuple(s)) for x, s in zip(given, shapes.values(), strict=True)]
    name, out = attention(a, values, {}, CPU, 23)
    out.value.name = "y"
    assert name == GQA and out.shape == (4, 6, 8)
    graph = ir.Graph(given, [out.value], nodes=nodes.made, opset_imports={"": 23, "com.microsoft": 1})
    model = ir.Model(graph, ir_version=10)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    tensors = {n: torch.randn(s, generator=torch.Generator().manual_seed(0)) for n, s in shapes.items()}
    found = torch.from_numpy(session.run(None, {n: x.numpy() for n, x in tensors.items()})[0])
    torch.testing.assert_close(found, interpret(a, tensors)["out"], atol=2e-6, rtol=1e-5)
    assert not [n for n in nodes.made if n.op_type in ("Expand", "Gather")]
