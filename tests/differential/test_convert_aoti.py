"""AOTInductor packages: what they compute where attncc is not, at other sizes, and on other instruction sets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cpp_kernels.build import host_isas, toolchain
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

from attncc.convert.aoti import Packing
from attncc.convert.convert import Wish, convert
from attncc.convert.exported import rewritten
from attncc.convert.exporting import exported
from attncc.frontends.targets import Target, TargetError

SOURCE = """
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x, mask):
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, 4, 16).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(sdpa(q, k, v, attn_mask=mask).transpose(1, 2).reshape(b, n, 64))

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x, doc):
        at = torch.arange(x.shape[1])
        mask = (doc[:, None, :, None] == doc[:, None, None, :]) & (at[:, None] >= at)
        for layer in self.layers:
            x = x + layer(x, mask)
        return x

def inputs(b, n, each):
    doc = (torch.arange(n) // each)[None].repeat(b, 1)
    return torch.randn(b, n, 64, generator=torch.Generator().manual_seed(n)), doc

def made():
    torch.manual_seed(0)
    return Model().eval(), inputs(2, 1100, 300)
"""
ELSEWHERE = """
import sys
sys.modules["attncc"] = None  # whoever imports it fails
import torch
from attncc_packaged import inputs, made
package = torch._inductor.aoti_load_package(sys.argv[1])
with torch.no_grad():
    for sizes in ((2, 1100, 300), (1, 77, 20), (3, 2048, 100)):
        given = inputs(*sizes)
        print(float((package(*given) - made()[0](*given)).abs().max()))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "attncc_packaged.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


@pytest.mark.full
def test_a_package_runs_without_attncc_at_any_size(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each instruction set computes the same; documents are passed over by tables that the package itself makes."""
    isas = tuple(host_isas())
    done = convert(Wish("attncc_packaged:made", folder / "model.pt2", "aoti", dynamic=("batch", "length"),
                        measure=False, isas=isas))  # fmt: skip
    assert done.report.fused == 2 and "checked on 3 sets" in done.checked
    for isa in isas:
        monkeypatch.setenv("ATTNCC_ISA", isa)
        ran = subprocess.run(
            [sys.executable, "-c", ELSEWHERE, str(folder / "model.pt2")], capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, ran.stderr
        errors = [float(x) for x in ran.stdout.split()]
        assert len(errors) == 3 and max(errors) < 2e-5


def test_calls_become_functions_with_tables_where_these_pay() -> None:
    toolchain()
    scope: dict[str, object] = {}
    exec(SOURCE, scope)
    model, given = scope["made"]()  # type: ignore[operator]
    for n, takes in ((1100, 5), (40, 4)):
        packing = Packing()
        program = exported(Target("model", model, tuple(x[:, :n] for x in given)), ("batch", "length"))
        graph = rewritten(program, kernels=False, form=packing.form).program.graph
        calls = [x for x in graph.nodes if "attncc_packed" in str(x.target)]
        assert len({x.target for x in calls}) == 1 and len(calls) == 2
        assert sum(isinstance(x.meta["val"], torch.Tensor) for x in calls[0].all_input_nodes) == takes


class Sunk(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sdpa(x, x, x)


def test_what_has_no_kernel_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    toolchain()
    monkeypatch.setattr("attncc.convert.aoti.cpp.unsupported", lambda a: "none of these")
    program = exported(Target("model", Sunk(), (torch.randn(1, 2, 8, 16),)), ())
    graph = rewritten(program, kernels=False, form=Packing().form).program.graph
    assert any(x.target is torch.ops.aten.scaled_dot_product_attention.default for x in graph.nodes)


def test_what_is_impossible_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    toolchain()
    with pytest.raises(TargetError, match="--isa avx9: known are amx"):
        Packing(["avx9"])
    with pytest.raises(TargetError, match="does not compile for it"):
        Packing(["neon", "avx2"])
    monkeypatch.setattr("attncc.convert.packing.find_toolchain", lambda: None)
    with pytest.raises(TargetError, match="none was found"):
        Packing()
