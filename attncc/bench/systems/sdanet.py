"""Row 32, PIDray's SDANet (arXiv 2108.07020): softmaxes over levels, by pooled features and by maps; global context."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attncc.bench.systems.system import Made, System, drawn, settled


class Levels(nn.Module):
    """Features of several levels at one size: weighted by channel, then by place, then a global context."""

    def __init__(self, dim: int, levels: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(dim, dim // 2)
        self.expand = nn.ModuleList(nn.Linear(dim // 2, dim) for _ in range(levels))
        self.maps = nn.Conv2d(dim, levels, 7, padding=3)
        self.context, self.transform = nn.Conv2d(dim, 1, 1), nn.Sequential(
            nn.Conv2d(dim, dim // 2, 1), nn.ReLU(), nn.Conv2d(dim // 2, dim, 1)
        )

    def forward(self, *features: Tensor) -> Tensor:
        stacked = torch.stack(features, 1)  # (B, levels, C, H, W)
        pooled = torch.relu(self.squeeze(stacked.sum(1).mean((-2, -1))))
        of_channels = torch.stack([layer(pooled) for layer in self.expand], 1).softmax(1)
        by_channel = (stacked * of_channels[..., None, None]).sum(1)
        of_places = self.maps(by_channel).softmax(1)
        x = (stacked * of_places[:, :, None]).sum(1) + by_channel
        weights = self.context(x).flatten(2).softmax(-1)  # (B, 1, HW)
        context = (x.flatten(2) @ weights.transpose(1, 2)).unsqueeze(-1)
        return x + self.transform(context)


def _make(full: bool) -> Made:
    dim, levels, side = (128, 4, 64) if full else (8, 3, 5)
    return settled(Levels(dim, levels), *drawn(*[(1, dim, side, side)] * levels))


SYSTEMS = (
    System(32, "SDANet", "levels and context", "pattern", _make, trains=True,
           left=("weights-whole-tensors/scores-layer", "weights-whole-tensors/scores-layer", "scores-layer")),
)  # fmt: skip
