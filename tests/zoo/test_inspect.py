"""`attncc inspect` on real models, through the driver and the compiler."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from attncc.cli.app import app
from attncc.ir import parse_program, print_program

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))


def inspect(*args: str) -> Result:
    return CliRunner().invoke(app, ["inspect", *args])


def test_windowed() -> None:
    read = json.loads(inspect("examples.windowed:model", "--json").stdout)
    (site,) = read["sites"]
    assert site["status"] in ("fused", "kept")
    lines = (ROOT / "examples" / "windowed.py").read_text(encoding="utf-8").splitlines()
    (line,) = (n for n, text in enumerate(lines, 1) if "softmax" in text)
    assert site["where"] == f"examples/windowed.py:{line}"
    assert site["shapes"]["q"][-2:] == [2048, 64]
    assert "j <= i" in site["mask"]
    assert "i <= j + 255" in site["mask"]
    text = inspect("examples.windowed:model", "--ir").stdout.split("\n", 1)[1].strip()
    assert print_program(parse_program(text)).strip() == text


@pytest.mark.parametrize("attention", ["llama", "llama_eager"])
def test_llama_is_found_in_either_spelling(attention: str) -> None:
    pytest.importorskip("transformers")
    read = json.loads(inspect(f"examples.families:{attention}", "--json").stdout)
    assert [site["path"] for site in read["sites"]] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert read["refused"] == 0
    assert {site["mask"] for site in read["sites"]} == {read["sites"][0]["mask"]}


def test_exported_program(tmp_path: Path) -> None:
    class Causal(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)

    torch.export.save(torch.export.export(Causal(), (torch.randn(1, 2, 64, 16),)), tmp_path / "causal.pt2")
    result = inspect(str(tmp_path / "causal.pt2"), "--json")
    assert result.exit_code == 0, result.stderr
    (site,) = json.loads(result.stdout)["sites"]
    assert site["mask"] == "j <= i"


def test_graphs_differ_where_something_was_fused() -> None:
    before = inspect("examples.windowed:model", "--graph", "before").stdout
    after = inspect("examples.windowed:model", "--graph", "after").stdout
    assert "softmax" in before
    assert before != after
    assert "attncc" in after


def test_the_backend_is_found_without_importing_attncc() -> None:
    code = (
        "import sys, torch\n"
        "q = torch.randn(1, 2, 32, 16)\n"
        "def f(q): return torch.nn.functional.scaled_dot_product_attention(q, q, q)\n"
        "got = torch.compile(f, backend='attncc')(q)\n"
        "assert 'attncc.driver.backend' in sys.modules\n"
        "torch.testing.assert_close(got, f(q))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_machine_without_a_compiler_runs_and_says_so_once(tmp_path: Path) -> None:
    code = (
        "import torch, attncc\n"
        "def f(q): return torch.nn.functional.scaled_dot_product_attention(q, q, q).relu()\n"
        "def g(q): return f(q) + 1\n"
        "q = torch.randn(1, 2, 32, 16)\n"
        "for model in (f, g):\n"
        "    torch.testing.assert_close(torch.compile(model, backend='attncc')(q), model(q))\n"
        "(site,) = attncc.explain(f, q).sites\n"
        "print(site.status, site.reason)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("CXX", "ATTNCC_CXX")}
    environment |= {"PATH": str(tmp_path), "ATTNCC_CACHE_DIR": str(tmp_path / "kernels")}
    environment |= {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("kept no C++ compiler found")
    assert done.stderr.count("attncc: no C++ compiler found") == 1
