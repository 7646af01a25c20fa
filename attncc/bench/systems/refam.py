"""Row 28, RefAM (arXiv 2509.22650): maps of cross-attention, averaged over heads, without stop words and sinks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attncc.bench.systems.system import Made, System, drawn, heads_of, joined, settled


class Maps(nn.Module):
    """The output, and of the weights the mean over heads and over the columns of words that matter."""

    def __init__(self, dim: int, heads: int, words: list[int], *, product: bool) -> None:
        super().__init__()
        self.heads, self.words, self.product = heads, words, product
        self.q, self.kv, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (heads_of(y, self.heads) for y in self.kv(text).chunk(2, -1))
        q = heads_of(self.q(image), self.heads)
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        out = self.out(joined(weights @ v))
        if not self.product:
            return out, weights.mean(1)[..., self.words].mean(-1)
        chosen = torch.zeros(text.shape[1], 1, dtype=text.dtype)
        chosen[self.words] = 1 / len(self.words)
        return out, (weights.mean(1) @ chosen)[..., 0]


def _make(full: bool, product: bool) -> Made:
    n, words, dim, heads = (4096, 512, 512, 8) if full else (20, 9, 16, 2)
    return settled(Maps(dim, heads, [1, 4, 5], product=product), *drawn((1, n, dim), (1, words, dim)))


SYSTEMS = (
    System(28, "RefAM", "chosen columns", "exact", lambda full: _make(full, False), 2),
    System(28, "RefAM", "product with the words", "exact", lambda full: _make(full, True), 2),
)
