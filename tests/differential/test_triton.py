"""Numerics of the Triton kernels, under Triton's interpreter, which a process has from its start or not at all."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FORWARD, BACKWARD, LINEAR = (
    Path(__file__).with_name(f"test_triton_{n}interpreted.py") for n in ("", "backward_", "linear_")
)


def run(file: Path, *options: str, **more: str) -> str:
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(file), *options]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", **more}
    done = subprocess.run(
        command, cwd=file.parents[2], env=environment, capture_output=True, text=True, check=False, timeout=1800
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.always
@pytest.mark.parametrize(("file", "least"), [(FORWARD, 10), (BACKWARD, 2), (LINEAR, 1)])
def test_under_the_interpreter(file: Path, least: int, request: pytest.FixtureRequest) -> None:
    """A fifth of them, another one with each part of the long tests; all with `--full`."""
    n, _ = request.config.option.shard or (1, 1)
    options = () if request.config.option.full else ("--part", f"{n % 5 + 1}/5")
    passed = re.search(r"(\d+) passed", run(file, *options))
    assert passed is not None and int(passed[1]) > least


@pytest.mark.full
@pytest.mark.parametrize("file", [FORWARD, BACKWARD])
def test_many_random_programs_under_the_interpreter(file: Path) -> None:
    assert "passed" in run(file, ATTNCC_TRITON_EXAMPLES="400")
