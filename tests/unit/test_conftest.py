"""Which of the tests marked `full` a run takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

CONFTEST = Path(__file__).parents[1] / "conftest.py"
FILE = """
import pytest

def test_short() -> None: ...

@pytest.mark.full
@pytest.mark.parametrize("n", range(40))
def test_long(n: int) -> None: ...
"""


COSTLY = """
import subprocess, sys, time

def test_quick() -> None: ...

def test_slow() -> None:
    work = "import time; end = time.process_time() + 1.1\\nwhile time.process_time() < end: pass"
    subprocess.run([sys.executable, "-c", work], check=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("sharded")
    (made / "conftest.py").write_text(CONFTEST.read_text())
    (made / "test_some.py").write_text(FILE)
    (made / "pytest.ini").write_text("[pytest]\n")
    return made


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def names(done: subprocess.CompletedProcess[str]) -> set[str]:
    assert done.returncode == 0, done.stdout
    return {line.split()[0] for line in done.stdout.splitlines() if "PASSED" in line}


def test_the_parts_are_all_of_the_full_tests_once(folder: Path) -> None:
    plain, whole = names(run(folder)), names(run(folder, "--full"))
    assert len(plain) == 1 and len(whole) == 41
    parts = [names(run(folder, "--shard", f"{n}/3")) - plain for n in (1, 2, 3)]
    assert sorted(x for part in parts for x in part) == sorted(whole - plain)
    assert all(len(part) > 5 for part in parts)


def test_the_part_is_printed_and_those_that_are_none_are_refused(folder: Path) -> None:
    assert "--shard 2/7" in run(folder, "--shard", "2/7", "-q").stdout
    refused = run(folder, "--shard", "8/7")
    assert refused.returncode != 0 and "8/7" in refused.stderr


def test_a_test_that_cost_too_much_is_one_of_the_long_ones(folder: Path) -> None:
    (folder / "test_costly.py").write_text(COSTLY)
    assert "test_costly.py::test_slow" in names(run(folder, "test_costly.py", "--update-costs"))
    known = json.loads((folder / "costs.json").read_text())
    assert list(known) == ["test_costly.py::test_slow"] and 1 <= known["test_costly.py::test_slow"] < 4
    (folder / "costs.json").write_text(json.dumps({"test_costly.py::test_slow": 4.5}))
    left = {"test_costly.py::test_quick"}
    assert names(run(folder, "test_costly.py")) == left == names(run(folder, "test_costly.py", "-m", "not full"))
    assert names(run(folder, "test_costly.py", "--full")) == {*left, "test_costly.py::test_slow"}


def test_a_part_of_all_tests(folder: Path) -> None:
    whole = names(run(folder, "test_some.py", "--full"))
    parts = [names(run(folder, "test_some.py", "--full", "--part", f"{n}/2")) for n in (1, 2)]
    assert set.union(*parts) == whole and not set.intersection(*parts)
