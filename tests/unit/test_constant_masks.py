"""Masks and distances that a file holds as data: those that follow a rule are made by it, others stay."""

from __future__ import annotations

import pytest
import torch

from attncc.convert.constant_masks import spelled

AT = torch.arange(7)
FAR = torch.arange(9) - AT[:, None]
RULES = {
    "causal": FAR <= 0, "causal-inverted": FAR > 0, "from-a-cache": FAR <= 2, "window": (FAR <= 0) & (FAR > -3),
    "both-sides": FAR.abs() < 2, "additive": torch.where(FAR <= 0, 0.0, -1e9), "diagonal": FAR == 0,
    "additive-window": torch.where((FAR <= 0) & (FAR > -3), 0.0, -torch.inf), "strict": FAR < 0,
    "distance": FAR, "scaled-distance": 3 - 2 * FAR.int(), "half": torch.where(FAR <= 0, 0.0, -6e4).half(),
}  # fmt: skip
OTHERS = {
    "window-and-sink": (FAR <= 0) & (FAR > -3) | (torch.arange(9) == 0), "all": torch.ones(7, 9, dtype=torch.bool),
    "columns": (torch.arange(9) < 4).expand(7, 9), "three-values": FAR.clamp(-1, 1).float(), "squares": FAR**2,
    "per-head": torch.stack([FAR <= 0, FAR <= 1]),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_what_follows_a_rule(name: str) -> None:
    x = RULES[name].expand(1, 2, 7, 9)
    rule = spelled(x)
    assert rule is not None
    made = rule()
    assert made.dtype == x.dtype and torch.equal(made, x)


@pytest.mark.parametrize("name", OTHERS)
def test_what_does_not(name: str) -> None:
    assert spelled(OTHERS[name]) is None
