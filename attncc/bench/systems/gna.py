"""Row 1, Generalized Neighborhood Attention (arXiv 2504.16922): windows that move by a stride, in each dimension."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from attncc.bench.systems.system import Made, System, drawn, heads_of, joined, settled


def visible(i: Tensor, j: Tensor, length: int, window: int, stride: int, dilation: int, causal: bool) -> Tensor:
    """Whether query i sees key j in one dimension."""
    group, at = i % dilation, i // dilation
    many = (length - group + dilation - 1) // dilation  # of the group of tokens that are a dilation apart
    if causal:
        leader = ((at // stride) * stride + stride - 1).minimum(many - 1)
        start, end = (leader - window + 1).clamp(min=0), at + 1
    else:
        leader = ((at // stride) * stride + stride // 2).minimum(many - 1)
        left, right = window // 2, window - 1 - window // 2
        over = (leader + right - many + 1).clamp(min=0)
        start = (leader - left).clamp(min=0) - over
        end = start + window
    key = j // dilation
    return (j % dilation == group) & (start <= key) & (key < end)


class Neighbourhood(nn.Module):
    """Attention over a grid of tokens, each to its window. `extra` tokens, which all see, stand before the grid."""

    def __init__(
        self, grid: Sequence[int], window: Sequence[int], stride: Sequence[int], dilation: Sequence[int],
        causal: Sequence[bool], dim: int, heads: int, *, eager: bool = False, extra: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.rules = list(zip(grid, window, stride, dilation, causal, strict=True))
        self.heads, self.eager, self.extra = heads, eager, extra
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def mask(self, i: Tensor, j: Tensor) -> Tensor:
        i, key = i - self.extra, j - self.extra
        row, seen = i, None
        for length, window, stride, dilation, causal in reversed(self.rules):
            here = visible(row % length, key % length, length, window, stride, dilation, causal)
            seen = here if seen is None else seen & here
            row, key = row // length, key // length
        assert seen is not None
        return seen | (j < self.extra) if self.extra else seen

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads_of(y, self.heads) for y in self.qkv(x).chunk(3, -1))
        token = torch.arange(x.shape[1])
        seen = self.mask(token[self.extra :, None], token)
        q = q[:, :, self.extra :]
        if self.eager:
            scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
            out = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v
        else:
            out = scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.proj(joined(out))


def flex(model: nn.Module) -> Callable[..., Tensor]:
    """The same weights with FlexAttention."""
    assert isinstance(model, Neighbourhood)
    lengths = [rule[0] for rule in model.rules]
    many = int(torch.tensor(lengths).prod())

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return model.mask(i + model.extra, j)

    block = create_block_mask(seen, None, None, many, many + model.extra, device="cpu")

    def call(x: Tensor) -> Tensor:
        q, k, v = (heads_of(y, model.heads) for y in model.qkv(x).chunk(3, -1))
        return model.proj(joined(flex_attention(q[:, :, model.extra :], k, v, block_mask=block)))  # type: ignore[arg-type]

    return torch.compile(call, dynamic=False)


def _image(full: bool, *, eager: bool) -> Made:
    grid, window, stride = ((48, 48), (13, 13), (4, 4)) if full else ((8, 6), (5, 3), (2, 3))
    dim, heads = (256, 4) if full else (8, 2)
    model = Neighbourhood(grid, window, stride, (1, 1), (False, False), dim, heads, eager=eager)
    return settled(model, *drawn((1, grid[0] * grid[1], dim)))


def _video(full: bool) -> Made:
    grid, window = ((16, 12, 12), (8, 5, 5)) if full else ((4, 4, 3), (2, 3, 3))
    dim, heads = (256, 4) if full else (8, 2)
    model = Neighbourhood(grid, window, (1, 2, 1), (1, 1, 1), (True, False, False), dim, heads, extra=3)
    return settled(model, *drawn((1, grid[0] * grid[1] * grid[2] + 3, dim)))


_CLAIM = "28-46% end to end on B200"
SYSTEMS = (
    System(1, "GNA", "SDPA", "exact", lambda full: _image(full, eager=False), 1, flex=flex, claim=_CLAIM,
           gap="the authors' figure is of whole video and image generators on a GPU; this is one layer on a CPU"),
    System(1, "GNA", "masked softmax", "exact", lambda full: _image(full, eager=True), 1, flex=flex, claim=_CLAIM),
    System(1, "GNA", "causal in time, text tokens", "exact", _video, 1, flex=flex, claim=_CLAIM),
)  # fmt: skip
