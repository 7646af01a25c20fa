"""Row 36, Attention-ResUNet (after arXiv 1804.03999): an additive gate on a skip connection, batch norms to fold."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from attncc.bench.systems.system import Made, System, drawn, settled


class Gate(nn.Module):
    """x * sigmoid(psi(relu(theta(x) + phi(g)))), g at half of the size."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.theta = nn.Sequential(nn.Conv2d(dim, inner, 1), nn.BatchNorm2d(inner))
        self.phi = nn.Sequential(nn.Conv2d(dim, inner, 1), nn.BatchNorm2d(inner))
        self.psi = nn.Sequential(nn.Conv2d(inner, 1, 1), nn.BatchNorm2d(1), nn.Sigmoid())

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        up = functional.interpolate(self.phi(g), size=x.shape[2:], mode="bilinear", align_corners=False)
        return x * self.psi(torch.relu(self.theta(x) + up))


def _make(full: bool) -> Made:
    dim, inner, side = (64, 32, 96) if full else (4, 2, 6)
    return settled(Gate(dim, inner), *drawn((1, dim, side, side), (1, dim, side // 2, side // 2)))


SYSTEMS = (System(36, "Attention-ResUNet", "additive gate", "pattern", _make, trains=True, left=("additive-gate",)),)
