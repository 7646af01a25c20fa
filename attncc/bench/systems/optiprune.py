"""Row 43, OptiPrune: tokens like the base token of their patch are left out, and take over what the likest gives."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention

from attncc.bench.systems.system import Made, System, drawn, heads_of, joined, settled


class Pruned(nn.Module):
    """One base token a patch; of the others those that are least like a base are kept."""

    base: Tensor
    others: Tensor

    def __init__(self, dim: int, heads: int, side: int, patch: int, keep: float) -> None:
        super().__init__()
        self.heads, self.keep = heads, keep
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        grid = torch.arange(side * side).view(side, side)
        base = grid[::patch, ::patch].flatten()
        others = torch.ones(side * side, dtype=torch.bool)
        others[base] = False
        self.register_buffer("base", base)
        self.register_buffer("others", others.nonzero()[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        batch, _, dim = x.shape
        unit = functional.normalize(x, dim=-1)
        alike = (unit[:, self.others] @ unit[:, self.base].mT).amax(-1)
        count = int(self.keep * self.others.shape[0])
        kept = self.others[alike.topk(count, largest=False).indices]
        kept = torch.cat([self.base.expand(batch, -1), kept], 1)
        at = kept[..., None].expand(-1, -1, dim)
        q, k, v = (heads_of(y, self.heads) for y in self.qkv(x.gather(1, at)).chunk(3, -1))
        out = joined(scaled_dot_product_attention(q, k, v))
        likest = (unit @ unit.gather(1, at).mT).argmax(-1)
        return self.out(out.gather(1, likest[..., None].expand(-1, -1, dim)))


def _make(full: bool) -> Made:
    side, patch, dim, heads = (64, 2, 256, 4) if full else (6, 2, 8, 2)
    return settled(Pruned(dim, heads, side, patch, 0.5), *drawn((1, side * side, dim)))


SYSTEMS = (
    System(43, "OptiPrune", "written out", "policy", _make, 1, left=("no-softmax/hard-attention",),
           gap="its constants are not public, and no policy of a plan prunes tokens yet"),
)  # fmt: skip
