"""Sums over places of a tensor, for which Inductor of torch 2.13 generates code that overwrites other memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).parents[1] / "support/scattering_programs.py"
FAULTY = torch.__version__ < "2.14"


@pytest.mark.parametrize(
    ("backend", "name", "noted"),
    [("ours", "permuted", FAULTY), ("ours", "columns", False), ("attncc", "outlook", FAULTY)],
)
def test_sums_over_places_stay_in_their_memory(backend: str, name: str, noted: bool, tmp_path: Path) -> None:
    """Forward and backward, in a process that the fault would end; what was generated otherwise is said."""
    env = os.environ | {
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "OMP_NUM_THREADS": "2", "ATTNCC_CACHE_DIR": str(tmp_path),
    }  # fmt: skip
    done = subprocess.run([sys.executable, str(PROGRAM), backend, name], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (done.stdout.strip() != "notes 0") == noted, done.stdout
