"""Rows 12-15: attention of a diffusion model under a map of blocks that was made before, for every head its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from attncc.bench.systems.system import heads_of, joined


class Blocked(nn.Module):
    """`forward(x, kept)`: kept[head, block of rows, block of keys]. `order`: where each token of the grid lies."""

    order: Tensor | None

    def __init__(self, dim: int, heads: int, block: int, order: Tensor | None = None) -> None:
        super().__init__()
        self.heads, self.block = heads, block
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.register_buffer("order", order)

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (heads_of(y, self.heads) for y in self.qkv(x).chunk(3, -1))
        return (q, k, v) if self.order is None else (q[:, :, self.order], k[:, :, self.order], v[:, :, self.order])

    def placed(self, out: Tensor) -> Tensor:
        return self.out(joined(out if self.order is None else out[:, :, self.order.argsort()]))

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        q, k, v = self.projected(x)
        seen = kept.repeat_interleave(self.block, -2).repeat_interleave(self.block, -1)[:, : q.shape[2], : q.shape[2]]
        scores = q @ k.mT * q.shape[-1] ** -0.5
        return self.placed(scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v)


def flex(model: nn.Module) -> Callable[..., Tensor]:
    """The same weights with FlexAttention, whose table of blocks is made once."""
    assert isinstance(model, Blocked)
    made: list[object] = []

    def inner(x: Tensor) -> Tensor:
        return model.placed(flex_attention(*model.projected(x), block_mask=made[0]))  # type: ignore[arg-type]

    run = torch.compile(inner, dynamic=False)

    def call(x: Tensor, kept: Tensor) -> Tensor:
        if not made:
            b, n = model.block, x.shape[1]
            made.append(create_block_mask(lambda _, h, i, j: kept[h, i // b, j // b], None, model.heads, n, n, "cpu"))
        return run(x)

    return call


def chosen(heads: int, blocks: int, share: float) -> Tensor:
    """A map that keeps that share of the blocks of each row, its own among them."""
    by = torch.Generator().manual_seed(3)
    scores = torch.rand(heads, blocks, blocks, generator=by) + 2 * torch.eye(blocks)
    best = scores.topk(max(1, round(share * blocks)), -1).indices
    return torch.zeros(heads, blocks, blocks, dtype=torch.bool).scatter(-1, best, True)
