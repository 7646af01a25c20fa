"""The GPU bench without a GPU: it says so in a line, and its rows mean the same in every spelling."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from attncc import bench_gpu
from attncc.bench_gpu_rows import (
    causal,
    decode,
    documents,
    neighbourhood,
    prefix_lm,
    rows,
    soft_cap,
    t5_bias,
    window,
)
from attncc.bench_row import Row, mask_of, visible_pairs
from attncc.codegen.triton import configs, emit, unsupported
from attncc.ir import interpret, parse_attention, verify
from attncc.passes.bounds import loop_bounds
from attncc.targets import TargetError

SMALL = [
    causal(64, 64), causal(64, 64, 4), window(64, 9), documents(64, 5), prefix_lm(64, 20), t5_bias(64), soft_cap(64),
    neighbourhood((8, 8), 2), neighbourhood((4, 4, 4), 1), decode(64, 3),
]  # fmt: skip


def small(row: Row) -> Row:
    return replace(row, batch=min(row.batch, 3))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(TargetError, match="needs a GPU"):
        bench_gpu.run(quick=True)


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
    for config in configs(a, "sm_90"):
        assert "def launch" in emit(a, loop_bounds(a, rows=True), config)


def test_a_row_is_measured_with_rivals_that_fail_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table's logic, with the clock and the rivals replaced."""

    def call(value: float) -> Any:
        return lambda row, t: lambda: torch.full((1,), value)

    def broken(row: Row, t: dict[str, torch.Tensor]) -> Any:
        raise ValueError("no such backend")

    monkeypatch.setattr(bench_gpu, "RIVALS", {"attncc": call(1.0), "flash": broken, "flex": call(1.5)})
    monkeypatch.setattr(bench_gpu, "on_cuda", lambda run, repeats: 0.001 * float(run()))
    done = bench_gpu.measure_row(small(decode(64, 3)), torch.device("cpu"), 1e12, 3)
    assert done["ratio"] == pytest.approx({"flex": 1.5})
    assert done["us"]["attncc"] == pytest.approx(1000.0)
    assert done["difference"] == pytest.approx(0.5)
    assert "no such backend" in done["absent"]["flash"]
