"""`attncc bench --suite longcontext`: masks as they are meant, and rows that say what was measured."""

from __future__ import annotations

import pytest
import torch

from attncc.bench.longcontext import BLOCK, MASKS, data, line, measured, run, table
from attncc.frontends.targets import TargetError


def seen(name: str, n: int = 3000) -> torch.Tensor:
    tokens = torch.arange(n)
    return MASKS[name](tokens[:, None], tokens[None], data(n)).expand(n, n)


def test_the_data_are_documents_and_blocks() -> None:
    x = data(3000)
    assert x["doc"].unique().tolist() == list(range(4)) and bool((x["doc"].diff() >= 0).all())
    for doc in range(4):
        assert x["start"][x["doc"] == doc].unique().tolist() == [int((x["doc"] == doc).nonzero()[0])]
    assert x["uniform"].shape == (-(-3000 // BLOCK),) * 2 and int(x["block"].max()) + 1 == x["variable"].shape[0]


@pytest.mark.parametrize("name", MASKS)
def test_each_token_sees_itself_and_a_mask_hides_something(name: str) -> None:
    mask = seen(name)
    assert bool(mask.diagonal().all()) and bool(mask.all()) == (name == "full")


def test_masks_are_those_of_their_names() -> None:
    causal = torch.ones(3000, 3000, dtype=torch.bool).tril()
    assert torch.equal(seen("causal documents"), seen("documents") & causal)
    assert torch.equal(seen("causal blockwise")[-1], causal[-1])  # the question sees all
    assert torch.equal(seen("causal blockwise")[500], seen("causal documents")[500])
    assert bool((seen("shared question")[:, data(3000)["doc"] == 0] == causal[:, data(3000)["doc"] == 0]).all())


@pytest.mark.slow
def test_a_row_says_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    row = measured("causal", 128, trains=True, rounds=1)
    assert row["status"] in ("fused", "kept") and row["density"] == pytest.approx(129 / 256)
    assert row["error"]["attncc"] < 1e-4 and row["ms"].keys() == row["gflops"].keys() >= {"attncc", "sdpa"}
    assert "causal, 128, forward and backward (50% visible" in line(row)
    assert "| causal | 128 | 50.4% | with backward" in table([row])


def test_rows_that_are_not_there() -> None:
    with pytest.raises(TargetError, match="no row is called 'nothing'; rows are full, causal"):
        run(only="nothing")
    assert run(only="none")["rows"] == []
