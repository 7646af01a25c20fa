"""Plans convert: a program that follows one, written with attncc's operator, with torch's alone, and as ONNX."""

from pathlib import Path

import msgspec
import pytest
import torch
from planned.keyed import Keyed, sample
from planned.made import plan, site

from attncc.convert import convert as converting
from attncc.convert.convert import Wish, convert
from attncc.convert.onnx_files import Session
from attncc.errors import PlanError
from attncc.frontends.targets import Target, TargetError
from attncc.plans.plan import Rule, SitePlan

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


FORMS = ["streaming{sinks=16,window=64}", "spans{alpha=0,beta=0.25,block=64}", "strides{block=64,local=2,stride=8}",
         "block-means{rows=64,keys=64,take=fraction,amount=0.25}", "certified-skip{eps=0.05}",
         "vertical-slash{columns=8,diagonals=16,rows=16,block=16,sinks=0,recent=8}"]  # fmt: skip


def follow(form: str, model: Keyed, path: Path) -> None:
    plan(model, replace_form(site(), form)).save(path)


def replace_form(s: SitePlan, form: str) -> SitePlan:
    return msgspec.structs.replace(s, rules=(Rule(form, (0,), 0.3, 1e-4),))


@pytest.mark.full
@pytest.mark.parametrize("form", FORMS)
def test_every_form_converts(form: str, model: Keyed, tmp_path: Path) -> None:
    """As a program with and without attncc's operator, and as a package; each is compared with the planned model."""
    follow(form, model, tmp_path / "p.json")
    for kind, portable in (("pt2", False), ("pt2", True), ("aoti", False)):
        done = convert(Wish("m:f", tmp_path / "out.pt2", kind, portable=portable, plan=tmp_path / "p.json"))
        assert done.checked.startswith("checked") and [s.status for s in done.report.sites] == ["fused"]


@pytest.mark.full
@pytest.mark.parametrize("form", FORMS)
def test_onnx_says_every_form(form: str, model: Keyed, tmp_path: Path) -> None:
    """Never silently exact: what was written computes what the plan does."""
    pytest.importorskip("onnxscript")
    follow(form, model, tmp_path / "p.json")
    out = tmp_path / "out.onnx"
    done = convert(Wish("m:f", out, "onnx", plan=tmp_path / "p.json", measure=False))
    assert done.checked.startswith("checked")
    (found,) = Session(out)(sample(1))
    exact = float((found - model(sample(1))).detach().abs().max())
    assert (exact < 3e-6) == form.startswith("certified-skip")
    assert any("certified-skip: nothing is left out" in x for x in done.report.notes) == form.startswith("certified")


class Unsayable(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.solve_triangular(x, x, upper=True)


def test_what_onnx_has_no_form_for_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    given = torch.eye(4).repeat(2, 1, 1)
    monkeypatch.setattr(converting, "load", lambda text: Target(text, Unsayable(), (given,)))
    with pytest.raises(TargetError, match=r"aten\.\w*solve_triangular has no form in ONNX"):
        convert(Wish("m:f", tmp_path / "out.onnx", "onnx"))
    assert not list(tmp_path.iterdir())
