"""Row 46, VoVNet / one-shot aggregation (arXiv 1904.09730, 1911.06667): features joined once; a gate in version two."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from attncc.bench.systems.system import Made, System, drawn, settled


class OneShot(nn.Module):
    def __init__(self, dim: int, layers: int, *, gated: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in range(layers))
        self.join = nn.Conv2d((layers + 1) * dim, dim, 1)
        self.gate = nn.Conv2d(dim, dim, 1) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        found = [x]
        for layer in self.layers:
            found.append(functional.relu(layer(found[-1])))
        y = functional.relu(self.join(torch.cat(found, 1)))
        if self.gate is not None:
            y = y * functional.hardsigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        return x + y


def _make(full: bool, gated: bool) -> Made:
    dim, layers, side = (64, 5, 56) if full else (4, 2, 6)
    return settled(OneShot(dim, layers, gated=gated), *drawn((1, dim, side, side)))


SYSTEMS = (
    System(46, "VoVNet", "first version", "none", lambda full: _make(full, False), trains=True),
    System(46, "VoVNet", "effective squeeze-and-excite", "none", lambda full: _make(full, True), trains=True,
           left=("squeeze-excite",)),
)  # fmt: skip
