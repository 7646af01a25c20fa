"""Numerics of the Triton kernels, under Triton's interpreter, which a process has from its start or not at all."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FILE = Path(__file__).with_name("test_triton_interpreted.py")


def run(**more: str) -> str:
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(FILE)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", **more}
    done = subprocess.run(
        command, cwd=FILE.parents[2], env=environment, capture_output=True, text=True, check=False, timeout=1800
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


def test_under_the_interpreter() -> None:
    passed = re.search(r"(\d+) passed", run())
    assert passed is not None and int(passed[1]) > 50


@pytest.mark.full
def test_many_random_programs_under_the_interpreter() -> None:
    assert "passed" in run(ATTNCC_TRITON_EXAMPLES="400")
