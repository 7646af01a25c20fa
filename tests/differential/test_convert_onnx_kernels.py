"""attncc's kernels in onnxruntime: what a model with a library beside it computes, where there is neither torch nor
attncc."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

from cpp_kernels.build import toolchain
from onnx import TensorProto, helper, numpy_helper

from attncc.codegen.cpp.onnxruntime import library
from attncc.codegen.cpp.packed import Packed
from attncc.convert.convert import Wish, convert
from attncc.ir import parse_attention

RUN = """
import sys
sys.modules["torch"] = sys.modules["attncc"] = None  # whoever imports them fails
import numpy as np
import onnxruntime

def session(path, library=None):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if library:
        options.register_custom_ops_library(library)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

before, after = session("before.onnx"), session("after.onnx", "./after.onnx.so")
session("after.onnx", "./after.onnx.so")  # the library serves several sessions
for shape in ((2, 3, 40, 16), (1, 3, 133, 16)):
    feed = {"x": np.random.default_rng(1).standard_normal(shape).astype(np.float32),
            "seen": np.arange(shape[2])[None] < np.full((shape[0], 1), shape[2] - 3)}
    print(np.abs(before.run(None, feed)[0] - after.run(None, feed)[0]).max())
"""


def model() -> bytes:
    """softmax(x x^T / 4 where a key is seen) x, of (batch, 3, length, 16), and the key's masks as booleans."""
    data = [numpy_helper.from_array(np.asarray(x), name) for name, x in (
        ("scale", np.float32(0.25)), ("low", np.float32(-np.inf)), ("axes", np.array([1, 2])),
    )]  # fmt: skip
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 1, 3, 2]), helper.make_node("MatMul", ["x", "t"], ["s"]),
        helper.make_node("Mul", ["s", "scale"], ["scaled"]), helper.make_node("Unsqueeze", ["seen", "axes"], ["keys"]),
        helper.make_node("Where", ["keys", "scaled", "low"], ["masked"]),
        helper.make_node("Softmax", ["masked"], ["w"], axis=-1), helper.make_node("MatMul", ["w", "x"], ["y"]),
    ]  # fmt: skip
    given = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, "length", 16]),
        helper.make_tensor_value_info("seen", TensorProto.BOOL, ["batch", "length"]),
    ]
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3, "length", 16])
    graph = helper.make_graph(nodes, "attention", given, [out], data)
    whole = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return bytes(whole.SerializeToString())


def run(folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN], cwd=folder, env={**os.environ, **more}, capture_output=True, text=True, check=False
    )


def test_a_model_with_its_library_runs_without_attncc(tmp_path: Path) -> None:
    toolchain()
    (tmp_path / "before.onnx").write_bytes(model())
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    done = convert(Wish(str(before), after, "onnx", measure=False, target="onnxruntime+attncc"))
    (site,) = done.report.sites
    assert site.status == "fused" and site.became == "attncc's kernel" and "checked on 3" in done.checked
    assert {x.name for x in tmp_path.iterdir()} == {"before.onnx", "after.onnx", "after.onnx.so"}
    ran = run(tmp_path)
    assert ran.returncode == 0, ran.stderr
    errors = [float(x) for x in ran.stdout.split()]
    assert len(errors) == 2 and max(errors) < 1e-5
    refused = run(tmp_path, ATTNCC_ISA="none")
    assert refused.returncode != 0 and "none of the instruction sets" in refused.stderr


def test_operators_give_their_types_and_shapes() -> None:
    text = """attention
size   N
batch  b = 2
axis   i = N, j = N, d = 8, e = 8
tensor q: bf16[2, N, 8]
tensor k: bf16[2, N, 8]
tensor v: bf16[2, N, 8]
tensor seen: bool[N]
q      q[b, i, d]
k      k[b, j, d]
v      v[b, j, e]
score  s
mask   seen[j]
norm   softmax
empty  zero
weight w
give   out, lse
dtype  bf16
layout b, i, e
"""
    source = library([Packed("some", parse_attention(text), ("avx512", "avx2"))])
    assert "inputs_some[] = {16, 16, 16, 9, 7};" in source and "outputs_some[] = {16, 1};" in source
    assert "found[0][1] = sizes[0];" in source and "found[1][0] = 2;" in source
    assert source.index('wanted("avx512")') < source.index('wanted("avx2")')
