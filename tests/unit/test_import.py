"""`import attncc` costs nothing: no Triton, no transformers, no compiler."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import attncc

pytestmark = pytest.mark.slow

HEAVY = ("triton", "transformers", "diffusers", "sentence_transformers")

# A compiler is a process that is started; a hook that sees one started fails the import.
PROBE = """
import sys

def no_process(event, args):
    if event in ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system", "os.fork"):
        started.append((event, args[0] if args else ""))

started = []
import torch  # its own import may look at the machine
sys.addaudithook(no_process)
import {module}
loaded = [name for name in {heavy!r} if name in sys.modules]
assert not loaded, f"loaded {{loaded}}"
assert not started, f"started {{started}}"
"""


@pytest.mark.parametrize("module", ["attncc", "attncc.driver.backend"])
def test_import_is_light(module: str) -> None:
    code = PROBE.format(module=module, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_probe_sees_a_heavy_import() -> None:
    code = PROBE.format(module="json", heavy=("json",))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "loaded ['json']" in done.stderr


def test_the_probe_sees_a_process(tmp_path: Path) -> None:
    (tmp_path / "starts.py").write_text("import subprocess; subprocess.run(['true'])")
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(module="starts", heavy=HEAVY)], capture_output=True, text=True, cwd=tmp_path
    )
    assert "started [('subprocess.Popen'" in done.stderr


@pytest.mark.parametrize(
    "first",
    ["pass", "attncc.explain", "import attncc.driver.backend", "import attncc.driver.explanation, attncc.cli.app"],
)
def test_public_names_are_functions_whatever_came_first(first: str) -> None:
    code = (
        f"import attncc\n{first}\n"
        "from types import FunctionType\n"
        "from attncc import backend, explain, explain_program\n"
        "names = ('backend', 'explain', 'explain_program')\n"
        "assert all(isinstance(getattr(attncc, name), FunctionType) for name in names)\n"
        "assert (attncc.backend, attncc.explain, attncc.explain_program) == (backend, explain, explain_program)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


CLONE = """
import importlib.metadata
try:
    importlib.metadata.version("attncc")
except importlib.metadata.PackageNotFoundError:
    pass
else:
    raise AssertionError("attncc is installed here")
import torch, attncc
report = attncc.explain(lambda q: torch.nn.functional.scaled_dot_product_attention(q, q, q), torch.randn(1, 2, 4, 8))
assert len(report.sites) == 1 and report.versions["attncc"] == attncc.__version__
"""


def test_a_clone_that_was_never_installed_explains(tmp_path: Path) -> None:
    """Everything that is installed here but attncc itself, which lies on the path."""
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        if "attncc" not in package.name:
            (tmp_path / package.name).symlink_to(package)
    paths = [str(Path(attncc.__file__).parents[1]), str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-S", "-c", CLONE], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_saved_program_loads_with_attncc_alone(tmp_path: Path) -> None:
    """One that was exported with its attention fused."""
    made = """
import sys, torch, attncc
from torch import nn
class Fused(nn.Module):
    def forward(self, q):
        return torch.ops.attncc.attention([q], [], SPEC)[0]
SPEC = '''attention
batch  b = 1, h = 2
axis   i = 4, j = 4, d = 8, e = 8
tensor q: f32[1, 2, 4, 8]
q      q[b, h, i, d]
k      q[b, h, j, d]
v      q[b, h, j, e]
score  s * 0.25
mask   j <= i
norm   softmax
empty  zero
weight w
give   out
dtype  f32
'''
torch.export.save(torch.export.export(Fused(), (torch.ones(1, 2, 4, 8),)), sys.argv[1])
"""
    loaded = """
import sys, torch, attncc
out = torch.export.load(sys.argv[1]).module()(torch.ones(1, 2, 4, 8))
torch.testing.assert_close(out, torch.ones(1, 2, 4, 8))
"""
    for code in (made, loaded):
        program = [sys.executable, "-c", code, str(tmp_path / "fused.pt2")]
        done = subprocess.run(program, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_nothing_is_printed_and_the_log_has_a_name() -> None:
    code = "import logging, attncc; logging.getLogger('attncc').error('silent where nobody listens')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_log_is_had_by_torchs_variable() -> None:
    """`TORCH_LOGS=+attncc` shows what attncc does, step by step."""
    code = (
        "import torch, attncc\n"
        "attncc.explain(lambda q: torch.nn.functional.scaled_dot_product_attention(q, q, q), torch.randn(1, 2, 4, 8))"
    )
    env = {**os.environ, "TORCH_LOGS": "+attncc"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "finding attention" in done.stderr, done.stderr
