"""The rows of the compile bench: what is printed of cold and of warm starts."""

from __future__ import annotations

from typing import Any

import pytest

from attncc.bench import compile as bench

COLD: dict[str, Any] = {
    "first call": 10.0, "wall": 20.0, "kernels and measuring": 1.0, "process": 15.0,
    "own": dict.fromkeys(bench.OWN, 0.1),
}  # fmt: skip


def test_a_row_with_and_without_warm_starts() -> None:
    warm = {**COLD, "warm": {"attncc": 4.2, "inductor": 4.0}, "warm process": {"attncc": 8.2, "inductor": 8.0}}
    assert "warm 4.2 / 4.0 (+5.0%), process 8.2 / 8.0 (+2.5%)" in bench.line("x", warm)
    assert "warm" not in bench.line("x", COLD)
    text = bench.table({"rows": {"a": warm, "b": COLD, "c": {"failed": "no word"}}})
    assert {line.count("|") for line in text.splitlines()} == {11}
    assert "| 4.2 / 4.0 (+5.0%) | 8.2 / 8.0 (+2.5%) |" in text


def test_starts_take_turns_and_the_median_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def process(folder: str, name: str, backend: str = "attncc") -> dict[str, Any]:
        calls.append(backend)
        return {**COLD, "first call": float(len(calls)), "process": 10.0 * len(calls)}

    monkeypatch.setattr(bench, "_process", process)
    row = bench._apart("llama 4 eager static")
    assert calls == ["attncc", "inductor"] * (1 + bench._WARM_STARTS)
    assert row["first call"] == 1.0 and row["warm"] == {"attncc": 5.0, "inductor": 6.0}
    assert row["warm process"] == {"attncc": 50.0, "inductor": 60.0}
