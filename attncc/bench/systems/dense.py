"""The model that policies apply to: causal or whole self-attention of grouped heads, as SDPA."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from attncc.bench.systems.system import Made, drawn, heads_of, joined, settled


class Dense(nn.Module):
    """Layers of attention with a residual, nothing of them sparse by itself."""

    def __init__(self, dim: int, heads: int, groups: int, *, causal: bool, layers: int = 1) -> None:
        super().__init__()
        self.heads, self.groups, self.causal = heads, groups, causal
        width = dim // heads
        self.q = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(layers))
        self.kv = nn.ModuleList(nn.Linear(dim, 2 * groups * width, bias=False) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for query, pair, out in zip(self.q, self.kv, self.out, strict=True):
            k, v = pair(x).chunk(2, -1)
            q, k, v = heads_of(query(x), self.heads), heads_of(k, self.groups), heads_of(v, self.groups)
            found = scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=self.groups < self.heads)
            x = x + out(joined(found))
        return x


def make(full: bool, *, causal: bool, tokens: int = 4096, few: int = 64) -> Made:
    n, dim, heads, groups = (tokens, 512, 8, 4) if full else (few, 32, 4, 2)
    return settled(Dense(dim, heads, groups, causal=causal), *drawn((1, n, dim)))


class Decoding(nn.Module):
    """One new token over a cache of keys and values that it is given."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.out = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = scaled_dot_product_attention(heads_of(self.q(x), self.heads), k, v, enable_gqa=True)
        return x + self.out(joined(found))


def decoding(full: bool) -> Made:
    n, dim, heads, groups = (16384, 512, 8, 2) if full else (96, 32, 4, 2)
    shape = (1, groups, n, dim // heads)
    return settled(Decoding(dim, heads), *drawn((1, 1, dim), shape, shape))
