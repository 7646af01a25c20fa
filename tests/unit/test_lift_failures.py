"""A site that fails for no foreseen reason is refused, says so, and leaves the other sites of its graph alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import attncc
from attncc.patterns import lift

pytestmark = pytest.mark.slow


class Two(torch.nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.mT).softmax(-1) @ v + F.scaled_dot_product_attention(q, k, v)


@pytest.mark.usefixtures("lenient")
def test_one_failing_site_does_not_cost_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise KeyError("no such rule")

    monkeypatch.setattr(lift, "lift_softmax", fails)
    report = attncc.explain(Two(), *(torch.randn(1, 2, 5, 8) for _ in range(3)))
    softmax, sdpa = report.sites
    assert softmax.status == "refused" and "it could not be read: KeyError: 'no such rule'" in (softmax.reason or "")
    assert sdpa.status in ("fused", "kept")
    assert not report.notes
