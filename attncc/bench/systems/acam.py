"""Row 26, ACAM-KD (arXiv 2503.06307): a student attends to its teacher, d_qk != d_v, sigmoid masks of what matters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attncc.bench.systems.system import Made, System, drawn, settled


class Adaptive(nn.Module):
    """Fused features give masks of channels and of places, which weigh the distance of the two."""

    def __init__(self, dim: int, masks: int) -> None:
        super().__init__()
        self.q, self.k = nn.Conv2d(dim, dim // 2, 1), nn.Conv2d(dim, dim // 2, 1)
        self.v, self.out = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1)
        self.channels, self.places = nn.Parameter(torch.zeros(masks, dim)), nn.Parameter(torch.zeros(masks, dim))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        q, k, v = self.q(student).flatten(2), self.k(teacher).flatten(2), self.v(teacher).flatten(2)
        weights = torch.softmax(torch.bmm(q.transpose(1, 2), k) / k.shape[1] ** 0.5, dim=-1)
        fused = self.out(torch.bmm(v, weights.transpose(1, 2)).view_as(student))
        of_channels = torch.sigmoid(self.channels * fused.mean((2, 3))[:, None])
        of_places = torch.sigmoid(torch.einsum("mc,bcn->bmn", self.places, fused.flatten(2)))
        apart = (student - teacher).square().flatten(2)
        return torch.einsum("bmc,bmn,bcn->b", of_channels, of_places, apart) / apart[0].numel()


def _make(full: bool) -> Made:
    dim, masks, side, batch = (128, 6, 40, 2) if full else (8, 2, 4, 2)
    return settled(Adaptive(dim, masks), *drawn((batch, dim, side, side), (batch, dim, side, side)))


SYSTEMS = (System(26, "ACAM-KD", "as published", "exact", _make, 1, trains=True),)
