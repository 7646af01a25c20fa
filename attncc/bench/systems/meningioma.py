"""Row 37, Meningioma AGUNet / DAUNet: gates, positions and channels in three dimensions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attncc.bench.systems.system import Made, System, drawn, settled


class VolumeGate(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.theta, self.phi, self.psi = nn.Conv3d(dim, dim, 1), nn.Conv3d(dim, dim, 1), nn.Conv3d(dim, 1, 1)

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        shares = torch.sigmoid(self.psi(torch.relu(self.theta(x) + self.phi(g))))
        return shares * x


class VolumeAttention(nn.Module):
    """Positions of a volume, then its channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Conv3d(dim, dim // 2, 1), nn.Conv3d(dim, dim // 2, 1), nn.Conv3d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x).flatten(2), self.k(x).flatten(2), self.v(x).flatten(2)
        places = v @ (q.mT @ k).softmax(-1).mT
        flat = x.flatten(2)
        channels = (flat @ flat.mT).softmax(-1) @ flat
        return x + (places + channels).view_as(x)


def _gate(full: bool) -> Made:
    dim, side = (16, 32) if full else (4, 3)
    return settled(VolumeGate(dim), *drawn((1, dim, side, side, side), (1, dim, side, side, side)))


def _attention(full: bool) -> Made:
    dim, side = (32, 12) if full else (4, 3)
    return settled(VolumeAttention(dim), *drawn((1, dim, side, side, side)))


SYSTEMS = (
    System(37, "Meningioma AGUNet", "gate", "pattern", _gate, trains=True, left=("additive-gate",)),
    System(37, "Meningioma DAUNet", "positions and channels", "pattern", _attention, 2, trains=True),
)
