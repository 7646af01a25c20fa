"""Conversion to exported programs: what is written computes what was given, with attncc and without it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

from attncc.convert import convert as converting
from attncc.convert.checking import CheckError, check, compare
from attncc.convert.convert import Wish, convert
from attncc.convert.exported import rewritten
from attncc.convert.exporting import exported, other_inputs
from attncc.convert.portable import portable_form
from attncc.frontends.targets import Target, TargetError, load

ATTENTION = torch.ops.attncc.attention.default
SDPA = torch.ops.aten.scaled_dot_product_attention.default


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    n = q.shape[-2]
    w = (q @ k.transpose(-1, -2) * 0.3).masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), float("-inf"))
    return w.softmax(-1) @ v


def grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    k, v = (x[:, :2].repeat_interleave(2, 1) for x in (k, v))
    return sdpa(q, k, v)


def capped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (5 * torch.tanh(q @ k.transpose(-1, -2) / 5)).softmax(-1) @ v


def biased(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    at = torch.arange(q.shape[-2])
    return (q @ k.transpose(-1, -2) - 0.1 * (at[:, None] - at).abs()).softmax(-1) @ v


def padded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    seen = torch.arange(k.shape[-2]) < 7
    return (q @ k.transpose(-1, -2) + torch.where(seen, 0.0, torch.finfo(q.dtype).min)).softmax(-1) @ v


def sigmoid(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(q @ k.transpose(-1, -2)) @ v


class Attends(nn.Module):
    def __init__(self, form: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form, self.qkv, self.out = form, nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return self.out(self.form(q, k, v).transpose(1, 2).flatten(-2))


def target(form: Callable[..., torch.Tensor] = causal) -> Target:
    torch.manual_seed(1)
    return Target("test", Attends(form), (torch.randn(2, 24, 32),))


FORMS = [causal, grouped, capped, biased, padded, sigmoid]


@pytest.mark.parametrize("dynamic", [(), ("batch", "length")], ids=["static", "dynamic"])
@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
def test_portable_programs_hold_no_operator_of_attncc(form: Callable[..., torch.Tensor], dynamic: tuple[str, ...]):
    program = exported(target(form), dynamic)
    made = rewritten(program, kernels=False, form=portable_form)
    assert [s.status for s in made.found.sites] == ["fused"]
    spaces = {n.target.namespace for n in made.program.graph.nodes if isinstance(n.target, torch._ops.OpOverload)}
    assert spaces == {"aten"}
    inputs = [program.example_inputs, *other_inputs(program)]
    assert len(inputs) == (3 if dynamic else 1)
    check(program.module(), made.program.module(), inputs)
    called = [n for n in made.program.graph.nodes if n.target is SDPA]
    assert len(called) == (form in (causal, grouped, biased, padded))
    if form is causal:
        assert called[0].args[5:6] == (True,)


def test_the_program_that_was_given_stays_as_it_is():
    program = exported(target())
    before = str(program.graph)
    rewritten(program, kernels=False)
    assert str(program.graph) == before


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [(), ("batch", "length")], ids=["static", "dynamic"])
def test_programs_with_operators(dynamic: tuple[str, ...]):
    program = exported(target(), dynamic)
    made = rewritten(program, measure=False)
    assert [n.target for n in made.program.graph.nodes].count(ATTENTION) == 1
    check(program.module(), made.program.module(), [program.example_inputs, *other_inputs(program)])


MODEL = "import test_convert_model\n"
SOURCE = """
import torch

class Model(torch.nn.Module):
    def forward(self, x):
        return (x @ x.transpose(-1, -2)).softmax(-1) @ x

def made(): return Model(), torch.randn(2, 16, 8)
"""
RUN = """
import sys, torch
{}
x = torch.randn(2, 16, 8)
found = torch.export.load(sys.argv[1]).module()(x)
torch.testing.assert_close(found, (x @ x.transpose(-1, -2)).softmax(-1) @ x)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "attncc_convert_model.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("portable", [False, True])
def test_a_file_runs_in_another_process(here: Path, portable: bool):
    out = here / "out.pt2"
    done = convert(Wish("attncc_convert_model:made", out, "pt2", portable=portable, measure=False))
    assert done.report.fused == 1 and done.checked
    script = RUN.format("assert 'attncc' not in sys.modules" if portable else "import attncc")
    ran = subprocess.run([sys.executable, "-c", script, str(out)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    again = load(str(out))
    assert again.exported


def test_nothing_is_written_where_the_programs_disagree(here: Path, monkeypatch: pytest.MonkeyPatch):
    out = here / "out.pt2"
    out.write_text("what was there")

    def wrong(graph: Any, call: Any) -> Any:
        (made,) = portable_form(graph, call)
        return [graph.call_function(torch.ops.aten.mul.Tensor, (made, 1.5))]

    monkeypatch.setattr(converting, "portable_form", wrong)
    with pytest.raises(CheckError, match=r"output 0: differs most at \[\d+, \d+, \d+\]"):
        convert(Wish("attncc_convert_model:made", out, "pt2", portable=True))
    assert out.read_text() == "what was there"
    assert sorted(x.name for x in here.iterdir() if "cache" not in x.name) == ["attncc_convert_model.py", "out.pt2"]


def test_a_dry_run_writes_nothing(here: Path):
    done = convert(Wish("attncc_convert_model:made", None, "pt2", portable=True))
    assert done.report.fused == 1
    assert not list(here.glob("*.pt2"))


@pytest.mark.parametrize(
    ("wanted", "found", "says"),
    [
        (torch.zeros(2), torch.zeros(3), r"float32\[3\] in place of float32\[2\]"),
        (torch.ones(2), torch.tensor([1.0, float("nan")]), "NaN"),
        (torch.ones(2), torch.tensor([1.0, 1.01]), r"differs most at \[1\], 1.01 in place of 1"),
        (torch.arange(3), torch.tensor([0, 1, 3]), "1 of 3 elements differ"),
        ((torch.ones(1),), (torch.ones(1), torch.ones(1)), "2 outputs in place of 1"),
    ],
    ids=["shape", "nan", "apart", "integers", "count"],
)
def test_differences_are_reported(wanted: Any, found: Any, says: str):
    with pytest.raises(CheckError, match=says):
        compare(wanted, found, "example inputs")


def test_bad_dimensions():
    with pytest.raises(TargetError, match="batch and length"):
        exported(target(), ("rows",))
