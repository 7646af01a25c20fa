"""Row 21, the masks of the Long-Context Attention Benchmark: causal documents with a prefix each, of twelve."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from attncc.bench.systems.system import Made, System, drawn, heads_of, joined, settled


class Packed(nn.Module):
    """Documents in one sequence; the first `prefix` tokens of each see each other."""

    def __init__(self, dim: int, heads: int, prefix: int) -> None:
        super().__init__()
        self.heads, self.prefix = heads, prefix
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def seen(self, i: Tensor, j: Tensor, document: Tensor, start: Tensor) -> Tensor:
        return (document[i] == document[j]) & ((j <= i) | (j - start[j] < self.prefix))

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (heads_of(y, self.heads) for y in self.qkv(x).chunk(3, -1))
        return q, k, v

    def forward(self, x: Tensor, document: Tensor, start: Tensor) -> Tensor:
        token = torch.arange(x.shape[1])
        seen = self.seen(token[:, None], token, document, start)
        return self.out(joined(scaled_dot_product_attention(*self.projected(x), attn_mask=seen)))


def flex(model: nn.Module) -> Callable[..., Tensor]:
    """The same weights with FlexAttention."""
    assert isinstance(model, Packed)
    made: list[object] = []

    def inner(x: Tensor) -> Tensor:
        return model.out(joined(flex_attention(*model.projected(x), block_mask=made[0])))  # type: ignore[arg-type]

    run = torch.compile(inner, dynamic=False)

    def call(x: Tensor, document: Tensor, start: Tensor) -> Tensor:
        if not made:
            n = x.shape[1]
            tables = document, start
            made.append(create_block_mask(lambda b, h, i, j: model.seen(i, j, *tables), None, None, n, n, "cpu"))
        return run(x)

    return call


def _make(full: bool) -> Made:
    n, dim, heads, prefix = (4096, 256, 4, 128) if full else (40, 8, 2, 3)
    by = torch.Generator().manual_seed(5)
    cuts = torch.randperm(n - 1, generator=by)[: 4 if full else 3].sort().values + 1
    document = torch.bucketize(torch.arange(n), cuts, right=True)
    starts = torch.cat([torch.zeros(1, dtype=torch.long), cuts])
    return settled(Packed(dim, heads, prefix), *drawn((1, n, dim)), document, starts[document])


SYSTEMS = (
    System(21, "Long-context masks", "prefix of documents", "exact", _make, 1, trains=True, flex=flex,
           claim="operations a second over the visible area, 1K-48K tokens",
           gap="all twelve static masks and both of blocks are measured by `attncc bench --suite longcontext`"),
)  # fmt: skip
