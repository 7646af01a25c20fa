"""Row 12, SparseD (arXiv 2509.24014): a diffusion language model keeps the blocks that an early step weighed most."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attncc.bench.systems.blocks import Blocked, chosen, flex
from attncc.bench.systems.system import Made, System, drawn, heads_of, joined, settled


class Early(nn.Module):
    """The step that makes the maps: full attention, and of its weights the mean of each pair of blocks."""

    def __init__(self, dim: int, heads: int, block: int, share: float) -> None:
        super().__init__()
        self.heads, self.block, self.share = heads, block, share
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (heads_of(y, self.heads) for y in self.qkv(x).chunk(3, -1))
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        b = self.block
        mass = weights.unflatten(-1, (-1, b)).unflatten(-3, (-1, b)).mean((-1, -3))
        best = mass.topk(int(mass.shape[-1] * self.share) + 1, -1).indices
        kept = torch.zeros_like(mass, dtype=torch.bool).scatter(-1, best, True)
        return self.out(joined(weights @ v)), kept


def _late(full: bool) -> Made:
    n, dim, heads, block = (4096, 256, 4, 128) if full else (40, 8, 2, 8)
    x = drawn((1, n, dim))
    return settled(Blocked(dim, heads, block), *x, chosen(heads, n // block, 0.3))


def _early(full: bool) -> Made:
    n, dim, heads, block = (2048, 256, 4, 128) if full else (40, 8, 2, 8)
    return settled(Early(dim, heads, block, 0.3), *drawn((1, n, dim)))


_CLAIM = "1.5x over FlashAttention at 64k tokens, 1024 steps"
SYSTEMS = (
    System(12, "SparseD", "later steps", "policy", _late, 1, flex=flex, claim=_CLAIM,
           gap="the model's own code; no policy of a plan carries a selection over diffusion steps yet"),
    System(12, "SparseD", "step that selects", "policy", _early, 1, claim=_CLAIM),
)  # fmt: skip
