"""The suite of policies, at sizes that take no time: what it times computes what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from attncc.bench import policies
from attncc.bench.policies import (
    DECODE,
    POLICIES,
    attention,
    block_row,
    example,
    kernel_call,
    least,
    line,
    policy_row,
    run,
    selection_call,
)  # fmt: skip
from attncc.ir import interpret_program
from attncc.ir.program import program_of_node
from attncc.passes.pipeline import Pipeline, parse_pipeline, standard

pytestmark = pytest.mark.slow


def test_every_policy_applies_to_what_is_timed() -> None:
    for spelling, rows in (*((x, 0) for x in POLICIES), *((x, 1) for x in DECODE)):
        (policy,) = parse_pipeline(spelling)
        p = program_of_node(attention(1024, "bf16", rows))
        assert policy(p) is not p


@torch.no_grad()
def test_what_is_timed_is_the_policy() -> None:
    (policy,) = parse_pipeline("block-means{rows=32,keys=32,take=fraction,amount=0.5}")
    a = attention(256, "f32")
    p = Pipeline((policy, *standard().passes)).run(program_of_node(a))
    tensors = example(a)
    select, names = selection_call(p, list(tensors.values()))
    made = dict(zip(names, select(), strict=True))
    wanted = interpret_program(p, tensors)[p.outputs[0]]
    assert_close(kernel_call(p, tensors | made)().reshape(wanted.shape), wanted, rtol=1e-4, atol=1e-5)


def test_the_least_of_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 0.005, 0.01, 0.012, 0.02, 0.023, 0.03, 0.031])
    monkeypatch.setattr(policies.time, "perf_counter", lambda: next(now))
    found = least({"x": lambda: None, "y": lambda: None}, 2)
    assert found == pytest.approx({"x": 3.0, "y": 1.0})


@torch.no_grad()
def test_rows_say_what_was_met(tmp_path: Path) -> None:
    row = block_row(64, 0.25, 1e9, 256, "f32", 1)
    assert "(<= 1e+09: met)" in line(row) and 0.25 <= row["density"] <= 1
    missed = {**row, "per_block": 2.0, "most": 1.3}
    assert "per block 2.00 of the dense kernel's (<= 1.3: missed)" in line(missed)
    ms = {"selection": 1.0, "sparse": 20.0, "dense": 42.0}
    told = line({"policy": "x", "dtype": "f32", "tokens": 1, "ms": ms, "share": 0.05, "off": 0.1})
    assert "selection 5.0% of sparse (<= 10%: met), dense / all 2.00x, output off by 0.100" in told
    whole = {**ms, "whole": 42.0}
    assert "dense / all 1.00x" in line({"policy": "x", "dtype": "f32", "ms": whole, "share": 0.05, "off": 0.1})
    report = run(quick=True, json=tmp_path / "r.json", only="none")
    assert report["rows"] == [] and json.loads((tmp_path / "r.json").read_text()) == report
    assert policy_row("chunk-means{chunk=32,budget=64}", 256, "f32", 0, 1)["share"] > 0
