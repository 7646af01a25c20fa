"""Row 33, CATNet (arXiv 2111.11057): a softmax over places for one query gates channels; gated sums over levels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attncc.bench.systems.system import Made, System, drawn, settled


class Context(nn.Module):
    """One query for all places, and the gate that its value gives; both written with einsum."""

    def __init__(self, dim: int, levels: int) -> None:
        super().__init__()
        self.scores, self.value = nn.Conv2d(dim, 1, 1), nn.Conv2d(dim, dim, 1)
        self.gate, self.levels = nn.Linear(dim, dim), nn.Conv2d(dim, levels, 1)

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        weights = self.scores(x).flatten(2).softmax(-1)
        context = torch.einsum("bqn,bcn->bc", weights, self.value(x).flatten(2))
        gated = x * torch.sigmoid(self.gate(context))[..., None, None]
        shares = torch.sigmoid(self.levels(gated))
        return torch.einsum("blhw,blchw->bchw", shares, torch.stack(others, 1)) + gated


def _make(full: bool) -> Made:
    dim, levels, side = (128, 3, 64) if full else (8, 2, 5)
    return settled(Context(dim, levels), *drawn(*[(1, dim, side, side)] * (levels + 1)))


SYSTEMS = (
    System(33, "CATNet", "einsum", "pattern", _make, trains=True, left=("scores-layer", "gate", "gated-levels")),
)
