"""Row 11, Sparsifiner (arXiv 2303.13755): a low-rank guess of the weights picks the keys of each token."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from attncc.bench.systems.system import Made, System, drawn, joined, settled


class Sparsified(nn.Module):
    """The first token, the class token, sees every key. The mask has no gradient."""

    def __init__(self, tokens: int, dim: int, heads: int, keep: float, *, scattered: bool) -> None:
        super().__init__()
        self.heads, self.keep, self.scattered = heads, keep, scattered
        width, rank = dim // heads, max(tokens // 8, 2)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.down_q, self.down_k = nn.Linear(width, width // 2), nn.Linear(width, width // 2)
        self.tokens_down = nn.Parameter(torch.zeros(tokens, rank))
        self.basis = nn.Parameter(torch.zeros(rank, tokens))

    @torch.no_grad()
    def seen(self, q: Tensor, k: Tensor) -> Tensor:
        n = q.shape[2]
        low_k = self.down_k(k).transpose(-1, -2) @ self.tokens_down
        coefficients = (self.down_q(q) @ low_k * self.heads**-0.5).softmax(-1)
        guess = coefficients @ self.basis.abs()
        budget = math.ceil(self.keep * n)
        best = guess.topk(budget, dim=-1)
        if self.scattered:
            seen = torch.zeros_like(guess).scatter(-1, best.indices, 1.0)
            seen[:, :, 0] = 1.0
            return seen > 0
        first = torch.arange(n)[:, None] == 0
        return (guess >= best.values[..., -1:]) | first

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~self.seen(q, k), float("-inf")).softmax(-1)
        return self.proj(joined(weights @ v))


def _make(full: bool, scattered: bool) -> Made:
    n, dim, heads = (785, 192, 3) if full else (25, 16, 2)
    return settled(Sparsified(n, dim, heads, 0.25, scattered=scattered), *drawn((4 if full else 1, n, dim)))


_CLAIM = "48-69% fewer operations of attention"
SYSTEMS = (
    System(11, "Sparsifiner", "scattered mask", "trained", lambda full: _make(full, True), 2, trains=True, claim=_CLAIM,
           gap="they count operations; a kernel that visits tiles saves none where each row keeps other keys. Rounding "
               "decides between keys at the threshold, in eager too"),
    System(11, "Sparsifiner", "threshold", "trained", lambda full: _make(full, False), 2, trains=True, claim=_CLAIM),
)  # fmt: skip
