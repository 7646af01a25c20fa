"""`attncc convert` around the conversion: what it prints, its exit codes, and what it asks for."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from attncc.cli.app import app
from attncc.convert import convert as converting
from attncc.convert.checking import CheckError

SOURCE = """
import torch

class Model(torch.nn.Module):
    def forward(self, x):
        return (x @ x.transpose(-1, -2)).softmax(-1) @ x

def made(): return Model(), torch.randn(2, 16, 8)
def fails(): return torch.nn.Linear(3, 4), torch.randn(2, 5)
"""
TARGET = "attncc_cli_convert_model:made"


def run(*args: str) -> Result:
    return CliRunner().invoke(app, ["convert", *args])


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "attncc_cli_convert_model.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_a_program_is_written() -> None:
    done = run(TARGET, "-o", "out.pt2", "--portable", "--dynamic", "batch,length")
    assert done.exit_code == 0, done.output
    assert "1 site: 1 fused" in done.stdout and "operators of torch" in done.stdout
    assert "checked on 3 sets of inputs" in done.stdout and "out.pt2: written" in done.stdout
    assert Path("out.pt2").is_file()


def test_a_dry_run_prints_the_table_alone() -> None:
    done = run(TARGET, "--dry-run", "--portable")
    assert done.exit_code == 0 and "1 site: 1 fused" in done.stdout and ": written" not in done.stdout


def test_a_failed_check_is_3(monkeypatch: pytest.MonkeyPatch) -> None:
    def differs(*_: object) -> str:
        raise CheckError("on example inputs, output 0: differs most at [0]")

    monkeypatch.setattr(converting, "check", differs)
    done = run(TARGET, "-o", "out.pt2", "--portable")
    assert done.exit_code == 3
    assert "not converted: on example inputs, output 0" in done.stderr
    assert not Path("out.pt2").exists()
    assert run(TARGET, "-o", "out.pt2", "--portable", "--no-check").exit_code == 0


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([TARGET], "name the file to write with -o"),
        ([TARGET, "-o", "out.bin"], "say what it is to be by its suffix"),
        ([TARGET, "-o", "out.onnx", "--portable"], "--portable is for .pt2 programs"),
        ([TARGET, "-o", "out.pt2", "--isa", "avx2"], "--isa goes with --to aoti"),
        ([TARGET, "-o", "out.pt2", "--target", "onnxruntime"], "--target is for .onnx files"),
        ([TARGET, "-o", "out.pt2", "--opset", "24"], "--opset is for .onnx files"),
        ([TARGET, "-o", "out.pt2", "--dialect", "linalg"], "--dialect are for .mlir files"),
        ([TARGET, "-o", "out.onnx", "--provider", "cuda"], "--provider goes with --target onnxruntime"),
        ([TARGET, "-o", "out.so", "--to", "aoti"], "torch loads packages from files named .pt2"),
        ([TARGET, "-o", "out.pt2", "--to", "aoti", "--isa", "avx9"], "--isa avx9: known are"),
        (["nowhere:made", "-o", "out.pt2"], "no module named 'nowhere'"),
        (["absent.pt2", "-o", "out.pt2"], "no such file"),
        (["absent.onnx", "-o", "out.pt2"], "no such file"),
        ([TARGET, "-o", "out.pt2", "--dynamic", "rows"], "batch and length"),
        (["attncc_cli_convert_model:fails", "-o", "out.pt2"], "torch.export cannot export it"),
        ([TARGET, "-o", "absent/out.pt2", "--portable"], "cannot be written"),
        ([TARGET, "-o", "out.pt2", "--plan", "absent.plan"], "absent.plan"),
    ],
    ids=[
        "no-output", "suffix", "portable", "isa-of-none", "target", "opset", "dialect", "provider",
        "package", "isa", "module", "pt2", "onnx", "dynamic",
        "export", "folder", "plan",
    ],
)
def test_bad_input_is_2_and_one_line(args: list[str], says: str, here: Path) -> None:
    before = {x.name for x in here.iterdir()}
    done = run(*args)
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("attncc: ") and says in done.stderr and done.stderr.count("\n") == 1
    assert {x.name for x in here.iterdir()} - {"__pycache__"} == before - {"__pycache__"}


def test_an_onnx_file_is_inspected(here: Path) -> None:
    pytest.importorskip("onnxscript")
    from onnx import helper  # noqa: PLC0415

    ends = [helper.make_tensor_value_info(name, 1, [2, 16, 8]) for name in "xy"]
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 2, 1]), helper.make_node("MatMul", ["x", "t"], ["s"]),
        helper.make_node("Softmax", ["s"], ["w"], axis=-1), helper.make_node("MatMul", ["w", "x"], ["y"]),
    ]  # fmt: skip
    graph = helper.make_graph(nodes, "attention", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    (here / "model.onnx").write_bytes(model.SerializeToString())
    done = CliRunner().invoke(app, ["inspect", "model.onnx", "--json"])
    assert done.exit_code == 0, done.output
    (site,) = json.loads(done.stdout)["sites"]
    assert site["equation"].startswith("softmax") and site["status"] in ("fused", "kept")
    done = CliRunner().invoke(app, ["inspect", "absent.onnx"])
    assert done.exit_code == 2 and "absent.onnx: no such file" in done.stderr
