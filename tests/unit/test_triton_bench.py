"""The GPU bench without a GPU: it says so in a line, and its rows mean the same in every spelling."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from attncc.bench import gpu
from attncc.bench.gpu_rows import (
    block_table,
    causal,
    decode,
    documents,
    neighbourhood,
    prefix_lm,
    rows,
    soft_cap,
    strided,
    t5_bias,
    window,
)
from attncc.bench.row import Row, mask_of, visible_pairs
from attncc.codegen.triton import configs, emit, reads_by_key, unsupported
from attncc.frontends.targets import TargetError
from attncc.ir import interpret, parse_attention, verify
from attncc.passes.bounds.bounds import loop_bounds
from attncc.runtime.triton_compile import compile_for

pytestmark = pytest.mark.slow

SMALL = [
    causal(64, 64), causal(64, 64, 4), window(64, 9), documents(64, 5), prefix_lm(64, 20), t5_bias(64), soft_cap(64),
    neighbourhood((8, 8), 2), neighbourhood((4, 4, 4), 1), block_table(64, 8, 0.3), strided(64, 4, 2, 4), decode(64, 3),
]  # fmt: skip


def small(row: Row) -> Row:
    return replace(row, batch=min(row.batch, 3))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(TargetError, match="needs a GPU"):
        gpu.run(quick=True)


@pytest.mark.parametrize("row", SMALL, ids=lambda r: r.name)
def test_all_spellings_agree(row: Row) -> None:
    row = small(row)
    a = verify(parse_attention(row.text))
    t = {n: x.double() if x.is_floating_point() else x for n, x in row.tensors(torch.device("cpu")).items()}
    mask = mask_of(row, t)
    k, v = (t[n].repeat_interleave(row.group, 1) for n in "kv")
    s = t["q"] @ k.transpose(-1, -2) * row.d**-0.5
    if row.score_mod is not None:
        h, i, j = (torch.arange(n).view(shape) for n, shape in (
            (row.heads * row.group, (1, -1, 1, 1)), (row.rows, (1, 1, -1, 1)), (row.keys, (1, 1, 1, -1))))
        s = row.score_mod(t)(s, 0, h, i, j)
    want = torch.softmax(s if mask is None else s.masked_fill(~mask, -torch.inf), -1) @ v
    got = interpret(a, t, [], compute=torch.float64)["out"].reshape(want.shape)
    assert torch.allclose(got, want, atol=1e-12)
    pairs = s.numel() if mask is None else int(mask.expand(s.shape).sum())
    assert visible_pairs(row, t) == pairs


@pytest.mark.parametrize("row", rows(quick=False), ids=lambda r: r.name)
def test_rows_are_emitted(row: Row) -> None:
    a = verify(parse_attention(row.text))
    assert unsupported(a) is None
    bounds = loop_bounds(a, rows=True)
    for lists in {False, reads_by_key(a)}:
        for config in configs(a, bounds, "sm_90", lists=lists):
            source = emit(a, bounds, config)
            assert "def launch" in source and ("def look(" in source) == lists


@pytest.mark.full
@pytest.mark.parametrize("row", rows(quick=False), ids=lambda r: r.name)
def test_rows_compile(row: Row) -> None:
    """The first choice of each row, as the run would build it on a Hopper GPU."""
    pytest.importorskip("triton")
    a = verify(parse_attention(row.text))
    bounds = loop_bounds(a, rows=True)
    config = configs(a, bounds, "sm_90", lists=reads_by_key(a))[0]
    source = emit(a, bounds, config)
    constants = {n: n != "PARTIAL" for n in ("PARTIAL", "EVEN", "TMA") if f"{n}: tl.constexpr" in source}
    built = compile_for(source, config, "sm_90", **constants)
    assert built.shared_bytes <= 227 * 1024 and built.spills <= 256


@pytest.mark.parametrize("row", [block_table(64, 8, 0.3), decode(64, 3)], ids=lambda r: r.name)
def test_a_row_runs_from_its_text_to_its_result(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel that the bench calls, on this machine's processor, with what the run does around it."""
    monkeypatch.setattr(gpu, "RIVALS", {"attncc": gpu.ours, "unfused": gpu.unfused})
    monkeypatch.setattr(gpu, "on_cuda", lambda run, repeats: float(run() is None) + 1e-3)
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: model)
    done = gpu.measure_row(small(row), torch.device("cpu"), 1e12, 1)
    assert done["absent"] == {} and done["difference"] < 0.05 and done["us"]["attncc"] > 0


def test_the_run_prints_and_writes_its_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One command from the rows to the JSON; a row that fails is named and the others go on."""

    def measured(row: Row, device: torch.device, ceiling: float, rounds: int) -> dict[str, Any]:
        if row.name.startswith("soft cap"):
            raise RuntimeError("out of registers")
        return {"name": row.name, "us": {"attncc": 10.0, "flex": 15.0}, "ratio": {"flex": 1.5}, "of_matmul": 0.5}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(gpu, "matmul_ceiling", lambda device: 5e14)
    monkeypatch.setattr(gpu, "measure_row", measured)
    gpu.run(quick=True, json=tmp_path / "gpu.json")
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["device"] == "a GPU" and {"torch", "triton"} <= set(written["versions"])
    assert [r["name"] for r in written["rows"]] == [r.name for r in rows(quick=True)]
    assert [r for r in written["rows"] if "failed" in r] == [{"name": "soft cap 4096", "failed": "out of registers"}]
    shown = capsys.readouterr()
    assert "1.50x" in shown.out and "out of registers" in shown.err


def test_a_row_is_measured_with_rivals_that_fail_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table's logic, with the clock and the rivals replaced."""

    def call(value: float) -> Any:
        return lambda row, t: lambda: torch.full((1,), value)

    def broken(row: Row, t: dict[str, torch.Tensor]) -> Any:
        raise ValueError("no such backend")

    monkeypatch.setattr(gpu, "RIVALS", {"attncc": call(1.0), "flash": broken, "flex": call(1.5)})
    monkeypatch.setattr(gpu, "on_cuda", lambda run, repeats: 0.001 * float(run()))
    done = gpu.measure_row(small(decode(64, 3)), torch.device("cpu"), 1e12, 3)
    assert done["ratio"] == pytest.approx({"flex": 1.5})
    assert done["us"]["attncc"] == pytest.approx(1000.0)
    assert done["difference"] == pytest.approx(0.5)
    assert "no such backend" in done["absent"]["flash"]
