"""Row 27, HeadHunter / SoftPAG (arXiv 2506.10978): the map of chosen heads moves towards the identity."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attncc.bench.systems.system import Made, System, drawn, heads_of, joined, settled


class Perturbed(nn.Module):
    """(1 - u) A + u I for some heads, written on the weights or on what they give."""

    share: Tensor

    def __init__(self, dim: int, heads: int, chosen: list[int], u: float, *, weights: bool) -> None:
        super().__init__()
        self.heads, self.weights = heads, weights
        share = torch.zeros(heads, 1, 1)
        share[chosen] = u
        self.register_buffer("share", share)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads_of(y, self.heads) for y in self.qkv(x).chunk(3, -1))
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        u = self.share
        if self.weights:
            same = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
            return self.out(joined(((1 - u) * weights + u * same) @ v))
        return self.out(joined((1 - u) * (weights @ v) + u * v))


def _make(full: bool, weights: bool) -> Made:
    n, dim, heads = (4096, 256, 4) if full else (20, 16, 4)
    return settled(Perturbed(dim, heads, [0, 2], 0.3, weights=weights), *drawn((1, n, dim)))


SYSTEMS = (
    System(27, "HeadHunter", "on the weights", "exact", lambda full: _make(full, True), 1),
    System(27, "HeadHunter", "on the output", "exact", lambda full: _make(full, False), 1),
)
