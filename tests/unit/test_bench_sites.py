"""The suite that counts what is found: a model whose answer is known, models that it cannot make, rows kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from attncc.bench import sites
from attncc.bench.sites import line, measured, run, table
from attncc.frontends.small import NotSmall, model_types, small_models

pytestmark = pytest.mark.slow


class TwoKinds(nn.Module):
    """An attention that attncc lifts, and a softmax that is none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.gate = nn.Linear(16, 48), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        attended = (q @ k.mT * 0.25).softmax(-1) @ v
        return attended * self.gate(x).softmax(-1).topk(1).values


def two_kinds(name: str, spelling: str) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    if name == "none":
        raise NotSmall("too many heads")
    g = torch.Generator().manual_seed(0)
    yield TwoKinds().eval(), {"x": torch.randn(2, 8, 15, generator=g)}  # does not fit
    yield TwoKinds().eval(), {"x": torch.randn(2, 8, 16, generator=g)}


def test_a_model_whose_sites_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sites, "small_models", two_kinds)
    row = measured("both", "eager")
    assert (row["calls"], row["lifted"], row["fused"], row["wrong"], row["breaks"]) == (2, 1, 1, False, 0)
    assert [("topk" in reason, "test_bench_sites.py" in reason) for reason in row["reasons"]] == [(True, True)]
    assert isinstance(row["inductor"], int)
    assert "2 calls, 1 lifted (1 fused), 1 refused" in line("both eager", row)


def test_numbers_that_differ_are_said_to_be_wrong() -> None:
    exact = [torch.zeros(3, dtype=torch.double)]
    assert sites._error([torch.tensor([0.0, 0.5, 0.0])], exact) == 0.5
    assert sites._error([torch.tensor([0.0, float("nan"), 0.0])], exact) == float("inf")
    assert sites._error([torch.zeros(2)], exact) == float("inf")


def test_rows_are_kept_and_what_is_skipped_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sites, "small_models", two_kinds)
    monkeypatch.setattr(sites, "model_types", lambda: iter(["none", "both"]))
    file = tmp_path / "sites.json"
    first = run(json=file, only="none")
    assert first["rows"]["none eager"] == {"skipped": "too many heads"}
    both = run(json=file)["rows"]
    assert list(both) == ["none eager", "none sdpa", "both eager", "both sdpa"]
    assert json.loads(file.read_text())["rows"] == both
    monkeypatch.setattr(sites, "measured", lambda *_: pytest.fail("it was measured before"))
    assert "| eager | 1 | 2 | 1 | 1 | 0 | 0 |" in table(run(json=file))


def test_models_are_made_small() -> None:
    assert {"bert", "llama", "vit"} <= set(model_types())
    model, inputs = next(small_models("bert", "eager"))
    assert sum(p.numel() for p in model.parameters()) < 100_000
    assert model(**inputs)[0].isfinite().all()
    with pytest.raises(NotSmall):
        next(small_models("align", "eager"))
