"""The CPU bench at sizes that take no time: its rows mean the same in every spelling, its report says what it holds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from attncc.bench import cpu
from attncc.bench.cpu_rivals import RIVALS, Tensors, eager, flex, inductor, read, sdpa, sdpa_gqa
from attncc.bench.cpu_rows import (
    CpuRow,
    Goal,
    alibi,
    causal,
    cross,
    decode,
    dense,
    documents,
    neighbourhood,
    prefix_lm,
    rows,
    small,
    soft_cap,
    swin,
    t5_bias,
    window,
)
from attncc.bench.report import line, markdown, plot, verdict
from attncc.bench.row import visible_pairs
from attncc.frontends.targets import TargetError
from attncc.ir import interpret, parse_attention, verify

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
SMALL = [
    dense(40), causal(40), window(40, 9), documents(40, 5), prefix_lm(40, 12), t5_bias(40), alibi(40), soft_cap(40),
    neighbourhood(6, 1), cross(30, 11), swin(2, 3), small("BERT", 2, 32), decode(50), decode(50, 2), decode(50, 1, 3),
]  # fmt: skip


def tensors(row: CpuRow) -> Tensors:
    return {n: x.double() if x.is_floating_point() else x for n, x in row.row.tensors(CPU).items()}


@pytest.mark.parametrize("row", SMALL, ids=lambda r: r.row.name)
def test_all_spellings_agree(row: CpuRow) -> None:
    row = cpu.in_dtype(row, "f32")
    a, t = verify(parse_attention(row.row.text)), tensors(row)
    want = interpret(a, t, [], compute=torch.float64)["out"].view(row.row.batch, -1, row.row.rows, row.row.d)
    at = torch.tensor([0, row.row.rows - 1])
    assert torch.allclose(eager(row.row, t)(t["q"], t["k"], t["v"]), want, atol=1e-6)
    assert torch.allclose(eager(row.row, t, at)(t["q"][:, :, at], t["k"], t["v"]), want[:, :, at], atol=1e-6)
    if row.row.name.startswith("soft-cap"):
        with pytest.raises(ValueError, match="not a function of the score"):
            sdpa(row.row, t)
        return
    assert torch.allclose(sdpa(row.row, t)(), want, atol=1e-6)  # type: ignore[arg-type]
    if row.row.group > 1:
        assert torch.allclose(sdpa_gqa(row.row, t)(), want, atol=1e-6)  # type: ignore[arg-type]


def test_a_plain_row_has_the_tensors_of_its_row() -> None:
    for row in rows(quick=False):
        if row.plain is not None:
            shape = (row.row.batch, row.row.heads, row.row.group, row.row.rows, row.row.keys, row.row.d)
            assert shape == tuple(getattr(row.plain, x) for x in ("batch", "heads", "group", "rows", "keys", "d"))
        assert any(g.than in ("plain", "area") for g in row.goals) == (row.plain is not None)


def test_rivals_that_cannot_say_why() -> None:
    huge = cpu.in_dtype(causal(65536), "f32").row
    tiny = cpu.in_dtype(dense(16), "f32").row
    for make, row, why in ((inductor, huge, "GiB of scores"), (sdpa, huge, "s a call"), (flex, huge, "s a call"),
                           (sdpa_gqa, tiny, "no grouped heads"), (read, tiny, "not bound by reading")):  # fmt: skip
        with pytest.raises(ValueError, match=why):
            make(row, {})


def test_names_are_all_different() -> None:
    for quick in (True, False):
        names = [r.row.name for r in rows(quick=quick)]
        assert len(set(names)) == len(names)


def test_a_row_is_checked_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    row = cpu.in_dtype(replace(decode(40), goals=(Goal("sdpa", {"f32": 1.0}),)), "f32")

    def broken(row: CpuRow, t: Tensors) -> Any:
        raise ValueError("out of order\nfor good")

    monkeypatch.setitem(RIVALS, "flex", broken)
    done = cpu.measure_row(row, 0.01, ["sdpa", "read", "flex"])
    assert done["absent"] == {"flex": "out of order"}
    assert set(done["ms"]) == {"attncc", "sdpa", "read"} and set(done["ratio"]) == {"sdpa", "read"}
    assert "attncc" in done["spread"] and all(x >= 0 for x in done["spread"].values())  # others may be too slow for one
    assert done["rounds"] >= 3 and done["decode"] and done["density"] == 1.0
    assert done["error"]["attncc"] < 1e-5 and done["error"]["sdpa"] < 1e-5
    assert done["goals"] == [{"than": "sdpa", "least": 1.0}]


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "error_of", lambda *_: 0.5)
    with pytest.raises(RuntimeError, match="differs from eager"):
        cpu.measure_row(cpu.in_dtype(decode(40), "f32"), 0.01, [])


def done(name: str, dtype: str, ratio: float, **more: Any) -> dict[str, Any]:
    return {"row": name, "dtype": dtype, "threads": 1, "absent": {}, "ms": {"attncc": 2.0, "sdpa": 2.0 * ratio},
            "error": {"attncc": 0.0}, "rounds": 3, "density": 0.25, "ratio": {"sdpa": ratio, "plain": 4.0},
            "gflops": 50.0, "gb_per_s": 1.0, "goals": [], "decode": False, "mm_gflops": 100.0, **more}  # fmt: skip


def test_goals_met_and_missed() -> None:
    row = done("x", "f32", 1.2)
    assert verdict(row, {"than": "sdpa", "least": 1.0}) == "SDPA x1.20 (>= 1) met"
    assert verdict(row, {"than": "sdpa", "least": 1.5}) == "SDPA x1.20 (>= 1.5) missed by 20%"
    assert verdict(row, {"than": "plain", "least": 1.15}) == "plain kernel x 0.25 (<= 1.15) met"
    # a quarter of the time on a quarter of the pairs
    assert verdict(row, {"than": "area", "least": 1.08}) == "area x 1.00 (<= 1.08) met"
    assert verdict(row, {"than": "read", "least": 0.85}) == ""


def test_reports() -> None:
    part = [done("dense 1024", "bf16", 2.0, absent={"flex": "too slow"}, goals=[{"than": "sdpa", "least": 2.5}]),
            done("dense 1024", "f32", 0.8), done("Swin & <others>", "f32", 3.0)]  # fmt: skip
    part[0]["ratio"]["flex"] = 4.0
    part[1]["absent"] = {"flex": "too slow"}
    part[1]["ratio"]["flex"] = 4.0
    report = {"machine": {}, "rows": part}
    text = markdown(report)
    assert "| dense 1024 | 2 | 50 GF/s | 50% | 2.00 | 4.00 | SDPA x2.00 (>= 2.5) missed by 20% |" in text
    assert text.index("### f32, 1 thread") < text.index("### bf16, 1 thread")
    assert "- flex: too slow (dense 1024)" in text
    assert text.index("| dense 1024 | 2 | 50 GF/s | 50% | 0.80") < text.index("| Swin & <others> |")
    ordered = markdown({"rows": [done(n, "f32", 1.0) for n in ("BERT 32", "causal 1024", "dense 1024")]})
    assert ordered.index("dense 1024") < ordered.index("causal 1024") < ordered.index("BERT 32")
    assert "missed by 20%" in line(part[0])
    drawn = ElementTree.fromstring(plot(report))
    bars = [x for x in drawn.iter("{http://www.w3.org/2000/svg}rect") if x.get("fill", "").startswith("#")]
    assert len(bars) == 3
    assert any(x.text == "Swin & <others>" for x in drawn.iter("{http://www.w3.org/2000/svg}text"))


def test_noise_is_reported() -> None:
    found = {32: 0.02, 64: 0.04, 128: 0.5}
    part = [done(f"BERT {n}", "f32", 1.0, spread={"attncc": x, "sdpa": x}) for n, x in found.items()]
    text = markdown({"rows": part})
    assert "lies 4% of their median apart" in text and "50% in the noisiest tenth" in text
    assert "2.000 ms +-2% " in line(part[1])


def test_parts_of_a_suite_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_measured", lambda row, *_: done(row.row.name, row.row.dtype, 1.5))
    monkeypatch.setattr(cpu, "build_all", lambda wanted: list(wanted))
    out = tmp_path / "report.json"
    cpu.run(quick=True, json=out, only="dense,BERT 32", dtypes=["f32"])
    report = cpu.run(quick=True, json=out, only="Swin, dense", dtypes=["bf16", "f32"], picture=tmp_path / "x.svg")
    assert json.loads(out.read_text()) == report
    assert sorted((r["row"], r["dtype"]) for r in report["rows"]) == [
        ("BERT 32", "f32"), ("Swin 7x7 windows", "bf16"), ("Swin 7x7 windows", "f32"), ("dense 1024", "bf16"),
        ("dense 1024", "f32"),
    ]  # fmt: skip
    assert (tmp_path / "x.svg").read_text().startswith("<svg")
    assert cpu.run(json=out, only="none")["rows"] == report["rows"]
    out.write_text(json.dumps({**report, "machine": {"processor": "another"}}))
    with pytest.raises(TargetError, match="another"):
        cpu.run(json=out, only="none")


def test_what_is_unknown() -> None:
    with pytest.raises(TargetError, match="no row is called 'nothing'"):
        cpu.run(only="nothing")
    with pytest.raises(TargetError, match="no dtype f8"):
        cpu.run(dtypes=["f8"])
    with pytest.raises(TargetError, match="no rival xformers"):
        cpu.run(rivals=["sdpa", "xformers"])


def test_visible_pairs_of_a_small_row() -> None:
    row = window(40, 9).row
    assert visible_pairs(row, row.tensors(CPU)) == 8 * sum(min(i + 1, 9) for i in range(40))
