"""Row 20, Information Pathways / SSA: in training each step sees a shuffled, locally biased part."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attncc.bench.systems.system import Made, System, drawn, heads_of, joined, settled


class Shuffled(nn.Module):
    """`places[i]` is where token i stands in this step's order: a window of it is what a token sees."""

    def __init__(self, dim: int, heads: int, window: int, *, sorted: bool) -> None:
        super().__init__()
        self.heads, self.window, self.sorted = heads, window, sorted
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        q, k, v = (heads_of(y, self.heads) for y in self.qkv(x).chunk(3, -1))
        if not self.sorted:
            scores = q @ k.mT * q.shape[-1] ** -0.5
            seen = (places[:, None] - places).abs() <= self.window
            return self.out(joined(scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v))
        order = places.argsort()
        i = torch.arange(x.shape[1])
        seen = (i[:, None] - i).abs() <= self.window
        q, k, v = q[:, :, order], k[:, :, order], v[:, :, order]
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, float("-inf"))
        return self.out(joined((scores.softmax(-1) @ v)[:, :, places]))


def shuffled(n: int, spread: float) -> Tensor:
    """Places of tokens that moved by a normal number each."""
    by = torch.Generator().manual_seed(4)
    order = (torch.arange(n) + spread * torch.randn(n, generator=by)).argsort()
    return order.argsort()


def _make(full: bool, sorted: bool) -> Made:
    n, dim, heads, window = (4096, 256, 4, 256) if full else (40, 8, 2, 6)
    return settled(Shuffled(dim, heads, window, sorted=sorted), *drawn((1, n, dim)), shuffled(n, window))


_CLAIM = "4-8x less memory and computation of attention in training"
SYSTEMS = (
    System(20, "SSA", "window of places", "exact", lambda full: _make(full, False), 1, trains=True, claim=_CLAIM),
    System(20, "SSA", "tokens shuffled", "exact", lambda full: _make(full, True), 1, trains=True, claim=_CLAIM),
)
