"""Row 22, Falcon Perception: causal documents without padding, image spans that see themselves, a gate by sums."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from attncc.bench.systems.system import Made, System, drawn, heads_of, joined, settled

END, PAD, IMAGE, IMAGE_END = 0, 1, 2, 3


def seen(i: Tensor, j: Tensor, document: Tensor, real: Tensor, span: Tensor) -> Tensor:
    image = (span[i] == span[j]) & (span[i] > 0)
    return image | ((j <= i) & (document[i] == document[j]) & real[j])


class Perceiving(nn.Module):
    """Queries and keys normalised without weights; out * sigmoid(lse - sink), the sink learned by head."""

    def __init__(self, dim: int, heads: int, groups: int, *, flexible: bool) -> None:
        super().__init__()
        self.heads, self.groups, self.flexible = heads, groups, flexible
        width = dim // heads
        self.q, self.kv = nn.Linear(dim, dim, bias=False), nn.Linear(dim, 2 * groups * width, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.sinks = nn.Parameter(torch.zeros(heads))

    def tables(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ends = (tokens == END).long()
        document = ends.cumsum(-1) - ends  # an end belongs to the document that it ends
        real = (tokens != PAD).cumsum(-1) > 0
        opened, closed = (tokens == IMAGE).long().cumsum(-1), (tokens == IMAGE_END).long().cumsum(-1)
        return document, real, torch.where(opened > closed, opened, 0)

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k, v = self.kv(x).chunk(2, -1)
        q, k, v = heads_of(self.q(x), self.heads), heads_of(k, self.groups), heads_of(v, self.groups)
        width = (q.shape[-1],)
        return functional.rms_norm(q, width), functional.rms_norm(k, width), v

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        q, k, v = self.projected(x)
        share = self.heads // self.groups
        k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
        i = torch.arange(x.shape[1])
        mask = torch.stack([seen(i[:, None], i, *(t[b] for t in self.tables(tokens))) for b in range(x.shape[0])])
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask[:, None], float("-inf"))
        total = scores.logsumexp(-1, keepdim=True)
        out = (scores - total).exp() @ v
        return self.out(joined(out * torch.sigmoid(total - self.sinks[:, None, None])))


def flex(model: nn.Module) -> Callable[..., Tensor]:
    """The same weights with FlexAttention, whose table of blocks is made once."""
    assert isinstance(model, Perceiving)
    made: list[object] = []

    def inner(x: Tensor) -> Tensor:
        q, k, v = model.projected(x)
        out, total = flex_attention(q, k, v, block_mask=made[0], enable_gqa=True, return_lse=True)  # type: ignore[arg-type]
        return model.out(joined(out * torch.sigmoid(total - model.sinks[:, None])[..., None]))

    run = torch.compile(inner, dynamic=False)

    def call(x: Tensor, tokens: Tensor) -> Tensor:
        if not made:
            document, real, span = model.tables(tokens)
            n = x.shape[1]
            made.append(create_block_mask(
                lambda b, h, i, j: seen(i, j, document[b], real[b], span[b]), x.shape[0], None, n, n, "cpu"
            ))  # fmt: skip
        return run(x)

    return call


def _make(full: bool) -> Made:
    batch, n, dim, heads, groups = (1, 2048, 256, 4, 2) if full else (2, 40, 16, 4, 2)
    by = torch.Generator().manual_seed(6)
    tokens = torch.randint(10, 99, (batch, n), generator=by)
    for b in range(batch):
        tokens[b, : 2 + b] = PAD
        tokens[b, n // 4], tokens[b, n // 2], tokens[b, n // 2 + n // 8] = END, IMAGE, IMAGE_END
        tokens[b, n - n // 5], tokens[b, n - n // 8] = IMAGE, IMAGE_END
    # a padded row sees no key of its own: what it gives is nobody's, and is made the mean by an own first token
    tokens[:, 0] = IMAGE_END + 7
    return settled(Perceiving(dim, heads, groups, flexible=False), *drawn((batch, n, dim)), tokens)


SYSTEMS = (System(22, "Falcon Perception", "written out", "exact", _make, 1, trains=True, flex=flex),)
