"""Row 8, CATANet (arXiv 2503.06896): tokens sorted by their nearest centre, groups attend to their own and the next."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention

from attncc.bench.systems.system import Made, System, drawn, settled


class Aggregated(nn.Module):
    """A stable sort; the last tokens are mirrored, so that the last group sees its keys twice. To it is added attention
    to the centres themselves."""

    def __init__(self, dim: int, heads: int, centres: int, group: int, *, eager: bool) -> None:
        super().__init__()
        self.heads, self.group, self.eager = heads, group, eager
        self.centres = nn.Parameter(torch.zeros(centres, dim))
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.centre_k, self.centre_v = (nn.Linear(dim, dim, bias=False) for _ in range(2))
        self.proj = nn.Linear(dim, dim)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not self.eager:
            return scaled_dot_product_attention(q, k, v)
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v

    def forward(self, x: Tensor) -> Tensor:
        batch, n, dim = x.shape
        near = functional.normalize(x, dim=-1) @ functional.normalize(self.centres, dim=-1).mT
        order = torch.sort(near.argmax(-1), dim=-1, stable=True).indices  # (B, N)
        back = order.argsort(-1)
        rows = order[..., None].expand(-1, -1, dim)
        q, k, v = (layer(x).gather(1, rows) for layer in (self.q, self.k, self.v))
        size = min(n, self.group)
        groups = -(-n // size)
        over = groups * size - n
        padded = torch.cat([q, q[:, n - over :].flip(1)], 1) if over else q
        query = padded.view(batch, groups, size, self.heads, -1).transpose(2, 3)
        more = over + size
        key, value = (
            torch.cat([y, y[:, n - more :].flip(1)], 1).unfold(1, 2 * size, size)  # (B, groups, C, 2 * size)
            .unflatten(2, (self.heads, -1)).transpose(-1, -2)
            for y in (k, v)
        )  # fmt: skip
        out = self.attend(query, key, value).transpose(2, 3).reshape(batch, groups * size, dim)[:, :n]
        centre_k, centre_v = (
            layer(self.centres).unflatten(-1, (self.heads, -1)).transpose(0, 1)[None].expand(batch, -1, -1, -1)
            for layer in (self.centre_k, self.centre_v)
        )
        whole = self.attend(q.unflatten(-1, (self.heads, -1)).transpose(1, 2), centre_k, centre_v)
        out = out + whole.transpose(1, 2).flatten(2)
        return self.proj(out.gather(1, back[..., None].expand(-1, -1, dim)))


def _make(full: bool, eager: bool) -> Made:
    n, dim, heads, centres, group = (4096, 64, 4, 64, 128) if full else (22, 8, 2, 3, 8)
    return settled(Aggregated(dim, heads, centres, group, eager=eager), *drawn((1, n, dim)))


SYSTEMS = (
    System(8, "CATANet", "SDPA", "trained", lambda full: _make(full, False), 2, trains=True),
    System(8, "CATANet", "written out", "trained", lambda full: _make(full, True), 2, trains=True),
)
