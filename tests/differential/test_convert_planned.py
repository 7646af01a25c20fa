"""Plans convert: a program that follows one, written with attncc's operator, with torch's alone, and as ONNX."""

from pathlib import Path

import pytest
import torch
from planned.keyed import Keyed, sample
from planned.made import plan

from attncc.convert import convert as converting
from attncc.convert.convert import Wish, convert
from attncc.errors import PlanError
from attncc.frontends.targets import Target

pytestmark = pytest.mark.slow


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Keyed:
    made = Keyed().eval()
    tokens = sample(0)
    monkeypatch.setattr(converting, "load", lambda text: Target(text, made, (tokens,)))
    return made


def eager_and(path: Path, model: Keyed, tokens: torch.Tensor) -> float:
    found = torch.export.load(path).module()(tokens)
    return float((found - model(tokens)).detach().abs().max())


@pytest.mark.parametrize("portable", [False, True])
def test_a_program_follows_a_plan(portable: bool, model: Keyed, tmp_path: Path) -> None:
    plan(model).save(tmp_path / "p.json")
    out = tmp_path / "out.pt2"
    done = convert(Wish("m:f", out, "pt2", portable=portable, plan=tmp_path / "p.json"))
    (site,) = done.report.sites
    assert site.status == "fused" and done.checked
    assert "planned" in site.code if not portable else "16" in site.mask or site.became == "operators of torch"
    tokens = sample(1)
    assert eager_and(out, model, tokens) > 3e-5  # the head that is planned sees fewer keys
    convert(Wish("m:f", out, "pt2", portable=True))
    assert eager_and(out, model, tokens) < 3e-6


def test_a_plan_for_other_weights(model: Keyed, tmp_path: Path) -> None:
    plan(Keyed(length=513)).save(tmp_path / "p.json")
    with pytest.raises(PlanError, match="other weights"):
        convert(Wish("m:f", tmp_path / "out.pt2", "pt2", portable=True, plan=tmp_path / "p.json"))
    assert not (tmp_path / "out.pt2").exists()


def test_onnx_follows_a_plan(model: Keyed, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    plan(model).save(tmp_path / "p.json")
    out = tmp_path / "out.onnx"
    done = convert(Wish("m:f", out, "onnx", plan=tmp_path / "p.json", measure=False))
    assert done.checked and done.report.sites
    assert [s.code for s in done.report.sites] == ["onnx-attention"]  # as torch's exporter writes SDPA with its mask
    (node,) = [n for n in onnx.load(out).graph.node if n.op_type == "Attention"]
    assert len(node.input) == 4  # and the window in that
