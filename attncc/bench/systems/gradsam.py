"""Row 29, Grad-SAM (arXiv 2204.11073): attention maps times their own gradients explain a prediction."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attncc.bench.systems.system import Made, System, drawn, heads_of, joined, settled


class Explained(nn.Module):
    """Two layers whose maps come out beside the prediction."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.ModuleList(nn.Linear(dim, 3 * dim) for _ in range(2))
        self.head = nn.Linear(dim, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        maps: list[Tensor] = []
        for layer in self.qkv:
            q, k, v = (heads_of(y, self.heads) for y in layer(x).chunk(3, -1))
            maps.append((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1))
            x = x + joined(maps[-1] @ v)
        return self.head(x.mean(1)), torch.stack(maps)


def _make(full: bool) -> Made:
    n, dim, heads = (384, 256, 4) if full else (12, 8, 2)
    return settled(Explained(dim, heads), *drawn((1, n, dim)))


SYSTEMS = (
    System(29, "Grad-SAM", "maps come out", "exact", _make, 2, trains=True,
           gap="the weights must exist, and have gradients: attention is kept as the model has it"),
)  # fmt: skip
