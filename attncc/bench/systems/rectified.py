"""Row 13, Rectified SpaAttn: critical blocks exactly, scaled, and the pooled rest beside them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attncc.bench.systems.system import Made, System, drawn, heads_of, joined, settled


class Rectified(nn.Module):
    """Pooled scores give the critical set of each block of queries (by mass, with a floor), what it weighs, and the
    weights of the other blocks, whose means of values are added."""

    def __init__(self, dim: int, heads: int, block: int, mass: float, floor: float) -> None:
        super().__init__()
        self.heads, self.block, self.mass, self.floor = heads, block, mass, floor
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads_of(y, self.heads) for y in self.qkv(x).chunk(3, -1))
        b, width = self.block, q.shape[-1]
        q_mean, k_mean, v_mean = (y.unflatten(2, (-1, b)).mean(3) for y in (q, k, v))
        pooled = q_mean @ k_mean.mT
        share = (pooled * width**-0.5).softmax(-1)
        ranked, at = torch.sort(share, dim=-1, descending=True, stable=True)
        least = int(self.floor * share.shape[-1])
        place = torch.arange(share.shape[-1])
        taken = (ranked.cumsum(-1) - ranked < self.mass) | (place < max(least, 1))
        critical = torch.zeros_like(taken).scatter(-1, at, taken)
        spread_q = (q.unflatten(2, (-1, b)) - q_mean.unsqueeze(3)).abs().mean(3)
        spread_k = (k.unflatten(2, (-1, b)) - k_mean.unsqueeze(3)).abs().mean(3)
        bound = spread_q @ k_mean.abs().mT + q_mean.abs() @ spread_k.mT
        passed = (pooled.abs() > bound) & ~critical
        ratio = share.masked_fill(passed, 0.0).sum(-1)
        rest = share.masked_fill(~passed, 0.0) @ v_mean
        seen = critical.repeat_interleave(b, -2).repeat_interleave(b, -1)
        scores = (q @ k.mT * width**-0.5).masked_fill(~seen, float("-inf"))
        sparse = scores.softmax(-1) @ v
        out = sparse * ratio.repeat_interleave(b, -1)[..., None] + rest.repeat_interleave(b, -2)
        return self.out(joined(out))


def _make(full: bool) -> Made:
    n, dim, heads, block = (4096, 256, 4, 128) if full else (48, 8, 2, 8)
    return settled(Rectified(dim, heads, block, 0.3, 0.2), *drawn((1, n, dim)))


SYSTEMS = (
    System(13, "Rectified SpaAttn", "written out", "policy", _make, 2, claim="3.33x HunyuanVideo, 2.08x Wan 2.1",
           gap="the model's own code; no policy of a plan adds a pooled rest yet; no Hilbert order, no text"),
)  # fmt: skip
