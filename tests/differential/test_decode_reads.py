"""Decode reads the keys that are there and no others: the rest of the cache lies in pages that cannot be read."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parents[1] / "support"
#: name -> (mask, rows, first key seen, end of the keys seen); keys a page holds 16 of, so ends are multiples of 16
CACHES = {
    "static": ("j <= position[i]", 1, 0, 112),
    "static, several rows": ("j <= position[i]", 7, 0, 112),
    "static, as a tensor": ("seen[b, 0, i, j]", 1, 0, 112),
    "static, several rows of a tensor": ("seen[b, 0, i, j]", 7, 0, 112),
    "static, left padding": ("start[b] <= j and j <= position[i]", 1, 32, 112),
    "left padding, as a tensor": ("seen[b, 0, i, j] and j <= position[i]", 1, 32, 112),
    "sliding": ("j <= position[i] and position[i] - j < 48", 1, 64, 112),
    "ring": ("0 <= position[i] - (position[i] - j) % M and (position[i] - j) % M < 48", 1, 0, 48),
    "ring, gone round": ("0 <= position[i] - (position[i] - j) % M and (position[i] - j) % M < 48", 1, 272, 320),
    "ring, across its end": ("0 <= position[i] - (position[i] - j) % M and (position[i] - j) % M < 48", 1, 240, 288),
}


QUICK = ("static", "static, several rows of a tensor", "ring, across its end")


def run(*cases: tuple[str, int, int, int, int]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "memory.guarded_decode", json.dumps(cases)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=900, cwd=SUPPORT)


def within(name: str) -> tuple[str, int, int, int, int]:
    mask, rows, first, end = CACHES[name]
    return mask, rows, first, end, end


@pytest.mark.parametrize("names", [QUICK, pytest.param(tuple(set(CACHES) - set(QUICK)), marks=pytest.mark.full)])
def test_only_what_was_written_is_read(names: tuple[str, ...]) -> None:
    done = run(*map(within, names))
    assert done.returncode == 0, (done.stdout.splitlines()[-1:], done.stderr[-2000:])


def test_a_read_beyond_ends_the_process() -> None:
    mask, rows, first, end = CACHES["static"]
    assert run((mask, rows, first, end, end - 16)).returncode == -signal.SIGSEGV
