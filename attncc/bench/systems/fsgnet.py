"""Row 35, FSG-Net: an additive gate as the weights of a guided filter, by sums over boxes in float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from attncc.bench.systems.system import Made, System, drawn, settled


class GuidedFilter(nn.Module):
    def __init__(self, dim: int, radius: int) -> None:
        super().__init__()
        self.radius = radius
        self.a, self.b, self.psi = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, 1, 1)

    def box(self, x: Tensor) -> Tensor:
        r = self.radius
        return functional.avg_pool2d(x, 2 * r + 1, 1, r, count_include_pad=False)

    def forward(self, x: Tensor, guide: Tensor) -> Tensor:
        gate = torch.sigmoid(self.psi(torch.relu(self.a(x) + self.b(guide)))).double() + 1e-3
        y, g = x.double(), guide.double()
        mean_w = self.box(gate)
        mean_g, mean_y = self.box(gate * g) / mean_w, self.box(gate * y) / mean_w
        variance = self.box(gate * g * g) / mean_w - mean_g * mean_g
        slope = (self.box(gate * g * y) / mean_w - mean_g * mean_y) / (variance + 1e-2)
        return (self.box(slope) * g + self.box(mean_y - slope * mean_g)).to(x.dtype)


def _make(full: bool) -> Made:
    dim, radius, side = (32, 4, 96) if full else (4, 1, 6)
    return settled(GuidedFilter(dim, radius), *drawn((1, dim, side, side), (1, dim, side, side)))


SYSTEMS = (System(35, "FSG-Net", "guided filter", "pattern", _make, left=("additive-gate",)),)
