"""The wheel owns one import name, and holds all of it; the links in the tree and the mapping in the wheel agree."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ROOMS = ("passes", "codegen", "patterns", "runtime")
INNER = ("bench", "cli", "convert", "driver", "frontends", "ir", "kernels", "plans", "report", "torch_private")


@pytest.fixture(scope="module")
def setuptools_table() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since a build leaves folders behind."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in ("attncc", *ROOMS, "examples"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def sources() -> set[str]:
    """Every file of the tree, headers and data included, under the name that it has in the wheel."""
    own = [*(ROOT / "attncc").glob("*"), *(p for room in INNER for p in (ROOT / "attncc" / room).rglob("*"))]
    rooms = [path for room in ROOMS for path in (ROOT / room).rglob("*")]
    found = {str(path.relative_to(ROOT)) for path in own if path.is_file()}
    found |= {f"attncc/{path.relative_to(ROOT)}" for path in rooms if path.is_file()}
    return {name for name in found if "__pycache__" not in name}


def test_the_wheel_holds_one_name(names: set[str]) -> None:
    tops = {name.split("/")[0] for name in names}
    assert "attncc" in tops
    assert all(top == "attncc" or (top.startswith("attncc-") and top.endswith(".dist-info")) for top in tops), tops


def test_the_wheel_holds_every_file(names: set[str]) -> None:
    assert {name for name in names if name.startswith("attncc/")} == sources()


def test_the_wheel_holds_data_licence_and_entry_points(names: set[str], wheel: Path) -> None:
    assert {"attncc/py.typed", "attncc/cli/sentences.txt"} <= sources()
    assert any(name.endswith("/LICENSE") for name in names)
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("attncc/cli/sentences.txt") == (ROOT / "examples" / "sentences.txt").read_bytes()
        (entry,) = (name for name in names if name.endswith("entry_points.txt"))
        text = archive.read(entry).decode()
    assert "[torch_dynamo_backends]\nattncc = attncc.dynamo:attncc_backend" in text
    assert "[console_scripts]\nattncc = attncc.cli.app:main" in text


def test_the_wheel_imports(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = "import attncc, attncc.ir, " + ", ".join(f"attncc.{room}" for room in ROOMS) + "; print(attncc.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == tmp_path / "attncc" / "__init__.py"


def test_links_and_mapping_agree(setuptools_table: dict[str, Any]) -> None:
    mapping: dict[str, str] = setuptools_table["package-dir"]
    links = {f"attncc.{p.name}": p for p in (ROOT / "attncc").iterdir() if p.is_symlink() and p.is_dir()}
    assert set(mapping) - {"attncc"} == set(links) == {f"attncc.{room}" for room in ROOMS}
    for name, link in links.items():
        assert not link.readlink().is_absolute()
        assert link.resolve() == (ROOT / mapping[name]).resolve()


def test_every_package_is_named(setuptools_table: dict[str, Any]) -> None:
    expected = {str(Path(name).parent).replace(os.sep, ".") for name in sources() if name.endswith(".py")}
    assert set(setuptools_table["packages"]) == expected


def test_the_top_level_holds_nothing_else() -> None:
    """Folders that git knows; a new one belongs into one of these."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    tops = {line.split("/")[0] for line in listed.stdout.splitlines() if "/" in line}
    assert tops == {".ci", "attncc", "docs", "examples", "tests", *ROOMS}
