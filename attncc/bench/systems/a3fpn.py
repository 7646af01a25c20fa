"""Row 34, A3-FPN: levels weighted by sigmoids, and features put together anew by weights of each place."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from attncc.bench.systems.system import Made, System, drawn, settled


class Pyramid(nn.Module):
    """Two levels: a sigmoid weight for each, then reassembly by a softmax over a k x k neighbourhood (CARAFE)."""

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.fine, self.coarse = nn.Conv2d(dim, 1, 1), nn.Conv2d(dim, 1, 1)
        self.kernel = nn.Conv2d(dim, size * size, 3, padding=1)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        batch, dim, high, wide = fine.shape
        up = functional.interpolate(coarse, scale_factor=2, mode="nearest")
        mixed = fine * torch.sigmoid(self.fine(fine)) + up * torch.sigmoid(self.coarse(up))
        weights = self.kernel(mixed).softmax(1)  # (B, k * k, H, W)
        near = functional.unfold(mixed, self.size, padding=self.size // 2).view(batch, dim, -1, high, wide)
        return (near * weights[:, None]).sum(2)


def _make(full: bool) -> Made:
    dim, size, side = (64, 5, 64) if full else (4, 3, 6)
    return settled(Pyramid(dim, size), *drawn((1, dim, side, side), (1, dim, side // 2, side // 2)))


SYSTEMS = (
    System(34, "A3-FPN", "level gates, reassembly", "pattern", _make, trains=True,
           left=("gate", "gate", "weights-whole-tensors/scores-layer")),
)  # fmt: skip
