"""Row 5, S2-Attention / DKernel (arXiv 2407.17678): near blocks and every n-th one, shifted by the head; some dense."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from attncc.bench.systems.system import Made, System, drawn, heads_of, joined, settled


class Strided(nn.Module):
    """Heads of queries that share one of keys share a pattern; the last `dense` heads see everything before them."""

    def __init__(
        self, dim: int, heads: int, groups: int, block: int, local: int, stride: int, dense: int, *, eager: bool
    ) -> None:
        super().__init__()
        self.heads, self.groups, self.block, self.local, self.stride = heads, groups, block, local, stride
        self.dense, self.eager = dense, eager
        width = dim // heads
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * groups * width)
        self.out = nn.Linear(dim, dim)

    def seen(self, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        q, k = i // self.block, j // self.block
        step, kv = max(1, self.stride // self.heads), head // (self.heads // self.groups)
        chosen = (q - k < self.local) | ((k + kv * step) % self.stride == 0)
        return (j <= i) & (chosen | (head >= self.heads - self.dense))

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k, v = self.kv(x).chunk(2, -1)
        return heads_of(self.q(x), self.heads), heads_of(k, self.groups), heads_of(v, self.groups)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.projected(x)
        token, head = torch.arange(x.shape[1]), torch.arange(self.heads)
        seen = self.seen(head[:, None, None], token[:, None], token)
        if not self.eager:
            return self.out(joined(scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)))
        share = self.heads // self.groups
        k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
        bias = torch.zeros(seen.shape, dtype=q.dtype).masked_fill(~seen, torch.finfo(q.dtype).min)
        scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + bias
        return self.out(joined(scores.softmax(-1) @ v))


def flex(model: nn.Module) -> Callable[..., Tensor]:
    """The same weights with FlexAttention."""
    assert isinstance(model, Strided)
    made: list[object] = []

    def inner(x: Tensor) -> Tensor:
        q, k, v = model.projected(x)
        return model.out(joined(flex_attention(q, k, v, block_mask=made[0], enable_gqa=True)))  # type: ignore[arg-type]

    run = torch.compile(inner, dynamic=False)

    def call(x: Tensor) -> Tensor:
        if not made:
            n = x.shape[1]
            made.append(create_block_mask(lambda b, h, i, j: model.seen(h, i, j), None, model.heads, n, n, "cpu"))
        return run(x)

    return call


def _make(full: bool, eager: bool) -> Made:
    n, dim, heads, groups = (4096, 512, 8, 2) if full else (44, 16, 4, 2)
    block, local, stride = (64, 4, 8) if full else (4, 2, 3)
    return settled(Strided(dim, heads, groups, block, local, stride, 1, eager=eager), *drawn((1, n, dim)))


_CLAIM = "up to 25.3x attention over FlashAttention-2, 6x training, 10x inference latency"
SYSTEMS = (
    System(5, "S2-Attention", "SDPA", "exact", lambda full: _make(full, False), 1, trains=True, flex=flex, claim=_CLAIM,
           gap="the largest figure is at 128k tokens on a GPU; 4096 here, where the local blocks weigh more"),
    System(5, "S2-Attention", "written out", "exact", lambda full: _make(full, True), 1, trains=True, flex=flex,
           claim=_CLAIM),
)  # fmt: skip
