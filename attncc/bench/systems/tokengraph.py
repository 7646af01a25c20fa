"""Row 44, graph-of-tokens mixture of experts (weakly specified, arXiv 2505.00792): attention mixes router logits."""

from __future__ import annotations

from torch import Tensor, nn

from attncc.bench.systems.system import Made, System, drawn, heads_of, joined, settled


class TokenGraph(nn.Module):
    """The mean over heads of the attention matrix mixes the router's logits of all tokens; few experts a token."""

    def __init__(self, dim: int, heads: int, experts: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out, self.router = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), nn.Linear(dim, experts)
        self.up, self.down = nn.Linear(dim, experts * dim // 4), nn.Linear(dim // 4, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads_of(y, self.heads) for y in self.qkv(x).chunk(3, -1))
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        x = x + self.out(joined(weights @ v))
        logits = weights.mean(1) @ self.router(x)
        gates = logits.softmax(-1)
        hidden = self.up(x).unflatten(-1, (gates.shape[-1], -1)).relu()
        return x + self.down((hidden * gates[..., None]).sum(-2))


class TokenGraphBefore(TokenGraph):
    """The router reads what comes into the layer, so that its columns can be values beside the model's own."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads_of(y, self.heads) for y in self.qkv(x).chunk(3, -1))
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        logits = weights.mean(1) @ self.router(x)
        x = x + self.out(joined(weights @ v))
        hidden = self.up(x).unflatten(-1, (logits.shape[-1], -1)).relu()
        return x + self.down((hidden * logits.softmax(-1)[..., None]).sum(-2))


def _make(full: bool, kind: type[TokenGraph]) -> Made:
    n, dim, heads, experts = (1024, 256, 4, 8) if full else (20, 16, 2, 4)
    return settled(kind(dim, heads, experts), *drawn((1, n, dim)))


SYSTEMS = (
    System(44, "Graph of tokens", "router after attention", "pattern", lambda full: _make(full, TokenGraph), 3,
           trains=True),
    System(44, "Graph of tokens", "router beside attention", "pattern", lambda full: _make(full, TokenGraphBefore), 3,
           trains=True),
)  # fmt: skip
