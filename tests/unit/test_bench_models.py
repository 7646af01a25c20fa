"""The models suite: its rows can be called again and again, its processes take turns, its report says what it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from attncc.bench import models as bench
from attncc.bench.model_report import line, markdown, plot
from attncc.bench.model_rows import rows
from attncc.frontends.targets import TargetError

TURNS: dict[str, Any] = {
    "ms": {"eager": 30.0, "inductor": 24.0, "attncc": 20.0}, "ratio": {"eager": 1.5, "inductor": 1.2}, "rounds": 9,
    "spread": {"attncc": 0.04}, "error": {"attncc": 1e-6},
}  # fmt: skip


def _stand_in(monkeypatch: pytest.MonkeyPatch, failing: str = "") -> list[str]:
    seen: list[str] = []

    def process(folder: str, name: str, dtype: str, threads: int, size: str, what: str) -> dict[str, Any]:
        seen.append(what)
        if what == failing:
            return {"failed": "no memory"}
        if what == "turns":
            return TURNS
        sites = {"sites": [6, 7]} if what == "attncc" else {}
        return {"first call": float(len(seen)), "memory": 100.0} | sites

    monkeypatch.setattr(bench, "_process", process)
    return seen


def test_first_calls_are_cold_then_warm_and_times_come_last(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = _stand_in(monkeypatch)
    out, table, picture = (tmp_path / f"m.{x}" for x in ("json", "md", "svg"))
    report = bench.run(True, out, only="MiniLM", threads=[1], table=table, picture=picture)
    assert seen == ["eager", "inductor", "attncc", "inductor", "attncc", "turns"]
    (row,) = json.loads(out.read_text())["rows"]
    assert row == report["rows"][0]
    assert row["cold first call"] == {"eager": 1.0, "inductor": 2.0, "attncc": 3.0}
    assert row["warm first call"] == {"inductor": 4.0, "attncc": 5.0}
    assert "Inductor 1.20x [1.1 met]" in line(row) and "6 of 7 sites" in line(row)
    text = table.read_text()
    assert report["machine"]["processor"] in text and "MiniLM 8x128 (two layers)" in text
    assert len({x.count("|") for x in text.splitlines() if x.startswith("|")}) == 1
    assert "MiniLM" in "".join(ElementTree.fromstring(picture.read_text()).itertext())


def test_a_row_that_fails_says_so_and_the_others_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _stand_in(monkeypatch)
    out = tmp_path / "m.json"
    bench.run(True, out, only="ViT", threads=[1])
    _stand_in(monkeypatch, failing="inductor")
    report = bench.run(True, out, only="Swin", threads=[1])
    assert [r["row"] for r in report["rows"]] == ["ViT-B 224", "Swin-T 224"]
    assert "inductor, cold: no memory" in line(report["rows"][1]) and "no memory" in markdown(report)
    assert "Swin" not in plot(report)


def test_machines_and_sizes_are_not_mixed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _stand_in(monkeypatch)
    out = tmp_path / "m.json"
    bench.run(True, out, only="ViT", threads=[1])
    with pytest.raises(TargetError, match="other sizes"):
        bench.run(False, out, only="ViT", threads=[1])
    held = json.loads(out.read_text())
    held["machine"]["processor"] = "another"
    out.write_text(json.dumps(held))
    with pytest.raises(TargetError, match="was measured on"):
        bench.run(True, out, only="ViT", threads=[1])


def test_a_goal_that_is_missed_says_by_how_much() -> None:
    row = {**TURNS, "row": "x", "dtype": "f32", "threads": 1, "quick": False, "sites": [0, 0], "least": 1.5,
           "memory": {}, "cold first call": {}, "warm first call": {}}  # fmt: skip
    assert "1.5 missed by 20%" in line(row) and "- / - / -" in line(row)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GPT-2 decode at 1024", "Swin-T 224"])
def test_a_model_gives_the_same_in_every_call_and_what_float64_gives(name: str) -> None:
    x = bench.made(name, "f32", "quick")
    with torch.no_grad():
        call = bench.called(x, "eager")
        first, second, exact = call(), call(), bench.called(bench._wider(x), "eager")()
    first, second, exact = (bench._floats(y) for y in (first, second, exact))
    assert bench._apart(first, second) == 0.0
    assert 0.0 < bench._apart(first, exact) < 1e-4


def test_names_of_rows_are_apart() -> None:
    names = [x.name for x in rows()]
    assert len(set(names)) == len(names) >= 9 and not [x for x in names if "," in x]


def test_memory_is_what_a_call_needs_at_its_peak() -> None:
    held = torch.ones(20_000_000)  # 80 MB that are there before
    needs = bench._growth(lambda: (torch.ones(40_000_000) + 1).sum() + held[0])
    if needs is None:
        pytest.skip("the system does not tell")
    assert 250 < needs < 400  # twice 160 MB
    little = bench._growth(lambda: held[:1000] + 1)
    assert little is not None and little < 50
