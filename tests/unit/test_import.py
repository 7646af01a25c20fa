"""`import attncc` costs nothing: no Triton, no transformers, no compiler."""

import subprocess
import sys
from pathlib import Path

import pytest

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
