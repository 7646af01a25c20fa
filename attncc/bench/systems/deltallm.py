"""Row 17, DeltaLLM, as far as it is public: keys near the last one that was sent repeat it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attncc.bench.systems.system import Made, System, drawn, heads_of, joined, settled


class Deltas(nn.Module):
    """Keys outside of a window are those of the last token that differed by a threshold, which a scan finds."""

    def __init__(self, dim: int, heads: int, window: int, threshold: float) -> None:
        super().__init__()
        self.heads, self.window, self.threshold = heads, window, threshold
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads_of(y, self.heads) for y in self.qkv(x).chunk(3, -1))
        n = q.shape[2]
        i, j = torch.arange(n)[:, None], torch.arange(n)
        moved = (k[:, :, 1:] - k[:, :, :-1]).abs().amax(-1) > self.threshold
        sent = torch.where(moved, j[1:], 0).cummax(-1).values
        sent = torch.cat([sent.new_zeros(*sent.shape[:2], 1), sent], -1)
        held = k.gather(2, sent[..., None].expand_as(k))
        scale = q.shape[-1] ** -0.5
        scores = torch.where(i - j < self.window, q @ k.mT * scale, q @ held.mT * scale)
        return self.out(joined(scores.masked_fill(j > i, float("-inf")).softmax(-1) @ v))


def _make(full: bool) -> Made:
    n, dim, heads, window = (2048, 256, 4, 256) if full else (40, 8, 2, 8)
    return settled(Deltas(dim, heads, window, 1.0), *drawn((1, n, dim)))


SYSTEMS = (
    System(17, "DeltaLLM", "written out", "policy", _make, 1, claim="57-60% sparsity",
           gap="threshold and window are not public, and no policy of a plan has its rule"),
)  # fmt: skip
