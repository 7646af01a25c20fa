"""What `attncc convert` leaves behind: weights as they were, data apart where there is much, whole files or none, and
models that onnxruntime alone serves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from attncc.convert import onnx_files  # noqa: E402
from attncc.convert.checking import CheckError  # noqa: E402
from attncc.convert.convert import Wish, convert  # noqa: E402


def model(width: int = 16) -> Any:
    """x times one weight, attended to causally: (batch, length, width)."""
    weight = np.random.default_rng(0).standard_normal((width, width)).astype(np.float32)
    weight[0, 0], weight[0, 1] = np.float32(1e-42), -0.0  # what a trip through other numbers would lose
    data = [numpy_helper.from_array(np.asarray(x), name) for name, x in (
        ("w", weight), ("scale", np.float32(0.25)), ("low", np.float32(-np.inf)), ("zero", np.int64(0)),
        ("one", np.int64(1)), ("rows", np.array([1])),
    )]  # fmt: skip
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Transpose", ["h"], ["t"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["h", "t"], ["s"]), helper.make_node("Mul", ["s", "scale"], ["scaled"]),
        helper.make_node("Shape", ["x"], ["shape"]), helper.make_node("Gather", ["shape", "one"], ["n"]),
        helper.make_node("Range", ["zero", "n", "one"], ["at"]), helper.make_node("Unsqueeze", ["at", "rows"], ["i"]),
        helper.make_node("LessOrEqual", ["at", "i"], ["seen"]), helper.make_node("Where", ["seen", "scaled", "low"],
        ["masked"]), helper.make_node("Softmax", ["masked"], ["p"], axis=-1), helper.make_node("MatMul", ["p", "h"],
        ["y"]),
    ]  # fmt: skip
    ends = [helper.make_tensor_value_info(x, TensorProto.FLOAT, ["batch", "length", width]) for x in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], data)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


@pytest.mark.parametrize("target", ["onnx", "onnxruntime"])
@pytest.mark.parametrize("apart", [False, True])
def test_weights_stay_byte_for_byte(apart: bool, target: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is too much data for the file itself: it lies beside it then."""
    if apart:
        monkeypatch.setattr(onnx_files, "MOST_INSIDE", 100)
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    before = model()
    onnx.save(before, source)
    done = convert(Wish(str(source), out, "onnx", measure=False, target=target))
    assert done.report.fused == 1 and done.checked
    names = {"in.onnx", "out.onnx"} | ({"out.onnx.data"} if apart else set())
    assert {x.name for x in tmp_path.iterdir()} == names
    (was,) = [numpy_helper.to_array(x) for x in before.graph.initializer if x.name == "w"]
    (now,) = [numpy_helper.to_array(x) for x in onnx.load(out).graph.initializer if x.name == "w"]
    assert now.tobytes() == was.tobytes()


def test_a_model_that_disagrees_leaves_the_old_file_and_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(model(), source)
    out.write_bytes(b"old")
    (tmp_path / "out.onnx.data").write_bytes(b"old data")

    def differs(*_: Any) -> str:
        raise CheckError("on example inputs")

    monkeypatch.setattr(onnx_files, "agree", differs)
    with pytest.raises(CheckError):
        convert(Wish(str(source), out, "onnx", measure=False))
    assert out.read_bytes() == b"old" and (tmp_path / "out.onnx.data").read_bytes() == b"old data"


KILLED = """
import os, signal, sys
from pathlib import Path
from attncc.convert.writing import replacing
with replacing(Path(sys.argv[1])) as path:
    path.write_bytes(b"half of it")
    (path.parent / (path.name + ".data")).write_bytes(b"data")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_that_is_killed_leaves_the_old_file(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    out.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(out)], env=dict(os.environ), check=False)
    assert done.returncode == -signal.SIGKILL
    assert out.read_bytes() == b"old" and not (tmp_path / "out.onnx.data").exists()


SERVED = """
import sys
for name in ("torch", "attncc", "onnx", "onnx_ir"):
    sys.modules[name] = None  # whoever imports one of them fails
import numpy as np
import onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
for batch, length in ((1, 5), (3, 40)):
    h = np.random.default_rng(length).standard_normal((batch, length, 16)).astype(np.float32)
    y = session.run(None, {"x": h})[0]
    assert y.shape == h.shape and np.isfinite(y).all()
    print(float(np.abs(y[:, 0]).max()))
"""


def test_onnxruntime_alone_serves_what_was_written(tmp_path: Path) -> None:
    """In a process that has neither torch nor attncc, nor a path to them."""
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(model(), source)
    convert(Wish(str(source), out, "onnx", measure=False, target="onnxruntime"))
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    ran = subprocess.run(
        [sys.executable, "-c", SERVED, str(out)], env=env, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0 and len(ran.stdout.split()) == 2, ran.stderr


def test_long_work_reports_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "in.onnx"
    onnx.save(model(), source)
    said: list[str] = []
    for where in ("attncc.convert.convert.step", "attncc.convert.onnx_files.step", "attncc.convert.checking.step"):
        monkeypatch.setattr(where, said.append)
    convert(Wish(str(source), tmp_path / "out.onnx", "onnx", measure=False))
    assert said == ["loading the model", "finding attention", "writing out.onnx",
                    *(f"checking, inputs {n} of 3" for n in (1, 2, 3))]  # fmt: skip
