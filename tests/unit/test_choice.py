"""What is not measured because its rival would take minutes and gigabytes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import attncc
from attncc.driver import selection
from attncc.runtime.measure import TIE

pytestmark = pytest.mark.slow


class Windowed(torch.nn.Module):
    def __init__(self, by_hand: bool) -> None:
        super().__init__()
        self.by_hand = by_hand

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        at = torch.arange(x.shape[-2])
        seen = (at[:, None] - at[None, :]).abs() < 8
        if self.by_hand:
            return (x @ x.mT).masked_fill(~seen, -torch.inf).softmax(-1) @ x
        return scaled_dot_product_attention(x, x, x, attn_mask=seen)


@pytest.mark.parametrize("by_hand, why", [(True, "its scores alone"), (False, "the mask that SDPA takes")])
def test_no_rival_is_set_up_whose_mask_or_scores_fill_a_gigabyte(
    by_hand: bool, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trial(*_: object) -> None:
        raise AssertionError("the rival's inputs were made")

    monkeypatch.setattr(selection, "trial", trial)
    torch.compiler.reset()
    x = torch.randn(1, 1, 16384 + 1, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        report = attncc.explain(Windowed(by_hand), x)
    assert [s.status for s in report.sites] == ["fused"]
    assert f"not measured: {why}" in report.sites[0].reason


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md"])
def test_the_promise_is_what_the_code_allows(page: str) -> None:
    text = (Path(__file__).parents[2] / page).read_text(encoding="utf-8")
    (promise,) = (x for x in re.split(r"\n(?=- |\d\. |\n)", text) if "what the site would be without it" in x)
    assert f"{TIE:.0%}" in promise
