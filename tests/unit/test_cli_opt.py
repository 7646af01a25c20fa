"""`attncc opt`: passes on text, from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from attncc.cli.app import app
from attncc.ir import Attention, parse_program

GROUPED = """attention
batch  h = 8
axis   i = 16, j = 16, d = 4, e = 4
tensor q: f32[8, 16, 4]
tensor k: f32[2, 16, 4]
tensor v: f32[2, 16, 4]
q      q[h, i, d]
k      k[h // 4, j, d]
v      v[h // 4, j, e]
score  bf16(s * 0.5)
mask   0 <= i - j
norm   softmax
empty  zero
weight w
give   out
dtype  f32
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "one.ir"
    path.write_text(GROUPED)
    return path


def run(*args: object, given: str | None = None) -> Result:
    return CliRunner().invoke(app, ["opt", *map(str, args)], input=given)


def test_the_standard_pipeline_runs_on_the_text_of_one_node(file: Path) -> None:
    done = run(file)
    assert done.exit_code == 0
    first, second = parse_program(done.stdout).steps
    assert isinstance(first.node, Attention) and len(first.node.batch) == 2
    assert repr(first.node.mask) == "j <= i" and repr(first.node.score) == "s * 0.5"
    assert "form   h0 h1 i e -> (h0 h1) i e" in done.stdout and second.results == ("out_0",)
    assert run("-", given=done.stdout).stdout == done.stdout, "nothing is left to do"


def test_passes_are_chosen_shown_timed_and_written(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "after.ir"
    options = ["--print-after", "all", "--time-passes", "--verify-each", "-o", out]
    done = run(file, "-p", "drop-rounding,split-axes", *options)
    assert done.exit_code == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("#")] == [
        "# after drop-rounding", "# after split-axes",
    ]  # fmt: skip
    assert "milliseconds" in done.stderr
    assert "mask   0 <= i - j" in out.read_text() and "bf16" not in out.read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["after.ir", "one.ir"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-p", "nothing-known"], "no pass 'nothing-known'; there are split-axes"),
        (["-p", "tile-tokens{grid=4x4}"], "tile-tokens: .*missing 1 required"),
        (["--print-after", "tile-tokens"], "no such pass runs; there are"),
        (["-p", "tile-tokens{grid=3x5,tile=3x1}"], "the pass tile-tokens failed: rows .* attncc opt .* -p"),
    ],
)
def test_bad_requests_get_one_line(file: Path, args: list[str], message: str) -> None:
    done = run(file, *args)
    assert done.exit_code == 2 and done.stdout == ""
    assert pytest.importorskip("re").search(message, done.stderr), done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "starts with the line 'program'"), (GROUPED.replace("softmax", "hardmax"), "norm is one of"),
        (GROUPED.replace("k[h // 4", "k[e // 4"), "k mentions e"), ("program\n" + "x" * (9 << 20), "over 8 MiB"),
    ],
    ids=["empty", "unparsable", "malformed", "huge"],
)  # fmt: skip
def test_bad_files_get_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.ir"
    path.write_text(text)
    done = run(path)
    assert done.exit_code == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_files_that_cannot_be_read_or_written_get_one_line(file: Path, tmp_path: Path) -> None:
    assert run(tmp_path / "nowhere.ir").exit_code == 2
    binary = tmp_path / "binary.ir"
    binary.write_bytes(b"\xff\xfe\x00")
    assert run(binary).exit_code == 2
    done = run(file, "-o", tmp_path / "no" / "folder.ir")
    assert done.exit_code == 2 and not (tmp_path / "no").exists()
