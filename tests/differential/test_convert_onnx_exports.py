"""Real models as torch's two exporters write them: every attention is found, and becomes the operator or stays for a
reason; the file gives in onnxruntime what it gave before."""

from pathlib import Path

import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("transformers")

from attncc.convert.convert import Wish, convert  # noqa: E402
from attncc.report.model import Report  # noqa: E402
from tests.support.exports.files import export  # noqa: E402
from tests.support.exports.merged import merged  # noqa: E402
from tests.support.exports.models import LAYERS, MODELS, made  # noqa: E402

#: torch's old exporter writes up to opset 17 and more, its new one from 18 on.
OPSETS = [(False, 14), (False, 17), (True, 18), (True, 20), (True, 23)]
#: Why attentions stay: diffusers calls SDPA, which torch's new exporter writes as the operator itself from opset 23 on.
STAYS = "Attention already"


def converted(source: Path, folder: Path) -> Report:
    done = convert(Wish(str(source), folder / "out.onnx", "onnx", measure=False))
    rewritten = any(s.status == "fused" for s in done.report.sites)
    assert done.checked.startswith("checked on") == rewritten, done.checked  # a file that stays as it is has no check
    return done.report


def judged(report: Report, sites: int, *, already: bool = False) -> None:
    found = [s for s in report.sites if s.equation]
    assert len(found) == sites, report.sites
    if already:
        assert all(s.status == "kept" and STAYS in s.reason for s in found), found
    else:
        assert all(s.status == "fused" for s in found), [s.reason for s in found]
    assert len(found) == len(report.sites), [s.reason for s in report.sites if not s.equation]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deberta", "llama", "vit"])
def test_traced_files(name: str, tmp_path: Path) -> None:
    model = made(name)
    export(model, tmp_path / "in.onnx", new=False, opset=17, dynamic=True)
    judged(converted(tmp_path / "in.onnx", tmp_path), model.sites)


@pytest.mark.full
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("new", "opset"), OPSETS, ids=[f"{'new' if new else 'old'}-{n}" for new, n in OPSETS])
@pytest.mark.parametrize("name", MODELS)
def test_every_file(name: str, new: bool, opset: int, dynamic: bool, tmp_path: Path) -> None:
    model = made(name)
    export(model, tmp_path / "in.onnx", new=new, opset=opset, dynamic=dynamic)
    judged(converted(tmp_path / "in.onnx", tmp_path), model.sites, already=name == "unet" and opset >= 23)


@pytest.mark.full
@pytest.mark.parametrize(("new", "opset"), [(False, 17), (True, 18)], ids=["old", "new"])
@pytest.mark.parametrize("name", MODELS)
def test_every_half_precision_file(name: str, new: bool, opset: int, tmp_path: Path) -> None:
    model = made(name)
    export(model, tmp_path / "in.onnx", new=new, opset=opset, dynamic=False, half=True)
    judged(converted(tmp_path / "in.onnx", tmp_path), model.sites)


@pytest.mark.slow
@pytest.mark.parametrize(("new", "opset"), [
    (False, 14), pytest.param(True, 18, marks=pytest.mark.full),
], ids=["old", "new"])  # fmt: skip
def test_decoders_merged_with_and_without_a_past(new: bool, opset: int, tmp_path: Path) -> None:
    """As optimum writes them: both branches of an `If` are whole decoders."""
    files = [tmp_path / f"{name}.onnx" for name in ("gpt2_first", "gpt2_cached")]
    for file in files:
        export(made(file.stem), file, new=new, opset=opset, dynamic=True)
    merged(*files, tmp_path / "in.onnx")
    judged(converted(tmp_path / "in.onnx", tmp_path), 2 * LAYERS)
    inner = [n.op_type for x in onnx.load(tmp_path / "out.onnx").graph.node for a in x.attribute for n in a.g.node]
    assert inner.count("Attention") == 2 * LAYERS and "Softmax" not in inner
