"""`attncc bench --suite train`: a row compares gradients, then times a step of each rival."""

from __future__ import annotations

import pytest
import torch

from attncc.bench import cpu_rows, train
from attncc.bench.cpu import in_dtype
from attncc.bench.train import TrainRow, dropped, line, measure_row
from attncc.frontends.targets import TargetError


@pytest.mark.parametrize(
    ("row", "compared"),
    [(dropped(cpu_rows.causal(40), 0.25), False), pytest.param(cpu_rows.causal(40), True, marks=pytest.mark.full)],
    ids=["dropped", "causal"],
)
def test_a_row(row: cpu_rows.CpuRow, compared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*_: object) -> None:
        raise ValueError("not here")

    monkeypatch.setattr(train, "inductor", without)  # what it takes to compile is not what is tested
    torch.manual_seed(0)
    done = measure_row(TrainRow(in_dtype(row, "f32"), {}), 0.01)
    assert done["absent"] == {"inductor": "not here"} and set(done["ratio"]) == {"sdpa"}
    assert 0 < done["error"]["attncc"] < 1e-5 and ("sdpa" in done["error"]) == compared
    assert done["ms"]["attncc"] > 0 and "kernel" in done["backward"] and "no inductor: not here" in line(done)


def test_what_is_dropped_is_drawn_anew_from_torchs_generator() -> None:
    row = dropped(cpu_rows.causal(40), 0.25).row
    torch.manual_seed(0)
    first, second = row.words(), row.words()
    torch.manual_seed(0)
    assert torch.equal(first, row.words()) and not torch.equal(first, second)
    assert "mix(words" in row.text and "1.3333333333333333" in row.text


def test_an_unknown_type() -> None:
    with pytest.raises(TargetError, match="no dtype f8"):
        train.run(dtypes=["f8"])
