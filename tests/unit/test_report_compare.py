"""`attncc diff`: what it calls a change, and what it refuses to read."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from attncc.cli.app import app
from attncc.report.compare import Change, changes
from attncc.report.model import SCHEMA, Report
from attncc.report.site import PAGE_ONLY, HeadForm, Site

SITE = Site(
    0, "fused", "faster", "layers.0.attn", "model.py:3", "softmax(s) v", "j <= i", {"q": (2, "n", 64)}, 25, 50, 100,
    "C++ avx512 kernel", 1.5, kernel="void f();", code="faster", timings={"attncc": 100.0, "SDPA": 150.0},
    isa="avx512",
)  # fmt: skip
REPORT = Report((SITE, replace(SITE, index=1, path="layers.1.attn")), machine={"threads": 2}, versions={"torch": "2"})
DOC = Path(__file__).parents[2] / "docs" / "report.md"


def read(report: Report) -> dict[str, Any]:
    return json.loads(json.dumps(report.to_dict()))


def compared(after: Report, before: Report = REPORT) -> list[Change]:
    return changes(read(before), read(after))


def test_equal_reports_have_no_changes() -> None:
    again = replace(SITE, timings={"attncc": 109.0, "SDPA": 138.0}, where="model.py:4")
    assert compared(REPORT) == [] and compared(replace(REPORT, sites=(again, REPORT.sites[1]))) == []


def test_a_site_that_is_another() -> None:
    other = replace(
        SITE, status="kept", became="SDPA", code="slower", mask="all", forms=(HeadForm("exact", (0, 1), 1.0, 0.0),),
        timings={"attncc": 300.0, "SDPA": 150.0},
    )  # fmt: skip
    found = compared(replace(REPORT, sites=(other, REPORT.sites[1])))
    assert {c.where for c in found} == {"layers.0.attn"}
    assert [c.what for c in found] == ["status", "code", "mask", "became", "forms", "time of attncc"]
    assert (found[0].before, found[0].after) == ("fused", "kept")
    assert (found[-1].before, found[-1].after) == ("100.0 us", "300.0 us")


def test_sites_that_come_and_go_move_no_other() -> None:
    """One more layer in front: the others are who they were, whatever their index."""
    first = replace(SITE, path="embedder.attn")
    moved = tuple(replace(s, index=s.index + 1) for s in REPORT.sites)
    (found,) = compared(replace(REPORT, sites=(first, *moved)))
    assert found == Change("embedder.attn", "site", "", "fused")
    (gone,) = compared(REPORT, replace(REPORT, sites=(first, *moved)))
    assert gone == Change("embedder.attn", "site", "fused", "")


def test_two_sites_of_one_module_are_told_apart() -> None:
    both = replace(REPORT, sites=(SITE, replace(SITE, index=1)))
    (found,) = compared(replace(both, sites=(SITE, replace(SITE, index=1, mask="all"))), both)
    assert found.where == "layers.0.attn #2" and found.what == "mask"


def test_another_kernel_of_the_same_attention_machine_and_notes() -> None:
    other = replace(REPORT, sites=(replace(SITE, kernel="void g();"), REPORT.sites[1]), notes=("no compiler",))
    assert [c.what for c in compared(other)] == ["kernel", "note"]
    slower = replace(SITE, timings={"attncc": 1000.0, "SDPA": 1500.0})
    elsewhere = replace(REPORT, machine={"threads": 1}, sites=(slower, REPORT.sites[1]))
    assert [(c.where, c.what) for c in compared(elsewhere)] == [("machine", "threads")], "times of two machines"


def run(*args: object) -> Any:
    return CliRunner().invoke(app, ["diff", *map(str, args)])


def test_the_command_says_what_changed(tmp_path: Path) -> None:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    a.write_text(json.dumps(REPORT.to_dict()))
    b.write_text(json.dumps(replace(REPORT, sites=(SITE,)).to_dict()))
    same, other = run(a, a), run(a, b)
    assert (same.exit_code, same.stdout) == (0, "no difference\n")
    assert other.exit_code == 1 and "layers.1.attn\n  site: fused -> none" in other.stdout
    both = tmp_path / "both.json"
    both.write_text(json.dumps({"inference": REPORT.to_dict(), "training": REPORT.to_dict()}))
    assert run(both, both).exit_code == 0 and run(a, both).exit_code == 2


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema": "attncc-report/9"}', f'{{"schema": "{SCHEMA}"}}', "[" * 100_000, "\x00"]
)
def test_what_is_no_report_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    refused = run(path, path)
    assert refused.exit_code == 2
    assert refused.stderr.startswith(f"attncc: {path}: ") and refused.stderr.count("\n") == 1
    assert run(tmp_path / "none.json", path).exit_code == 2


def test_layers_that_changed_alike_are_told_once_and_broken_reports_in_one_line(tmp_path: Path) -> None:
    old, new = read(REPORT), read(replace(REPORT, sites=tuple(replace(s, isa="avx2") for s in REPORT.sites)))
    broken = read(REPORT)
    broken["sites"][0]["timings"] = {"attncc": "fast"}
    a, b, c = (tmp_path / name for name in ("a.json", "b.json", "c.json"))
    for path, report in ((a, old), (b, new), (c, broken)):
        path.write_text(json.dumps(report))
    done = CliRunner().invoke(app, ["diff", str(a), str(b)])
    assert done.exit_code == 1 and done.stdout == "layers.{0-1}.attn\n  isa: avx512 -> avx2\n"
    assert CliRunner().invoke(app, ["diff", str(a), str(c)]).exit_code == 2


def test_the_page_describes_every_field() -> None:
    described = set(re.findall(r"^\| `(\w+)`", DOC.read_text(), re.MULTILINE))
    own = {f.name for f in fields(Site)} - {*PAGE_ONLY}
    assert own | set(REPORT.to_dict()) | {f.name for f in fields(HeadForm)} == described
    assert f"`{SCHEMA}`" in DOC.read_text()
