"""Models that notice how the result of their attention lies in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from zoo.case import Case
from zoo.spellings import B, D, Extra, H, N, Q, attend

SCALE = D**-0.5


def then(after: Callable[[Q], Q]) -> Callable[[Q, Q, Q, Extra], Q]:
    return lambda q, k, v, extra: after((q @ k.mT * SCALE).softmax(-1) @ v)


def viewed(out: Q) -> Q:
    return out.view(B * H, N, D).view(B, H, N, D)


def viewed_after_arithmetic(out: Q) -> Q:
    return (out * 2 + 1).view(B * H, N, D).view(B, H, N, D)


def strided(out: Q) -> Q:
    return out.as_strided((B, H, N, D), (H * N * D, N * D, D, 1))


def written_through_a_view(out: Q) -> Q:
    out.view(B * H, N * D).mul_(2)
    return out


def written_behind_a_copy(out: Q) -> Q:
    """In the model the reshaped tensor is a copy: what is written to it must not reach the other."""
    copy = out.transpose(1, 2).reshape(B, N, H * D)
    copy.mul_(2)
    return out + copy.view(B, N, H, D).transpose(1, 2)


def channels_first(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    out = v.mT @ (q @ k.mT * SCALE).softmax(-1).mT
    return out.view(B, H * D, N).view(B, H, D, N).mT


def sdpa_viewed(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).view(B, N, H * D).view(B, N, H, D).transpose(1, 2)


class Bare(torch.nn.Module):
    """The result leaves as it is: its strides are the model's."""

    def forward(self, q: Q, k: Q, v: Q) -> Q:
        return (q @ k.mT * SCALE).softmax(-1) @ v


def bare() -> tuple[torch.nn.Module, tuple[Q, ...], dict[str, Q]]:
    g = torch.Generator().manual_seed(3)
    return Bare(), tuple(torch.randn(B, N, H, D, generator=g).transpose(1, 2) for _ in range(3)), {}


MEMORY = (
    Case("memory-view", attend(then(viewed)), 1, "axes merged by view", golden=0),
    Case("memory-view-dynamic", attend(then(viewed)), 1, "the same at unknown lengths", dynamic=True),
    Case("memory-arithmetic", attend(then(viewed_after_arithmetic)), 1, "a view behind arithmetic"),
    Case("memory-strided", attend(then(strided)), 1, "strides given as numbers"),
    Case("memory-written", attend(then(written_through_a_view)), 1, "a write through a view"),
    Case("memory-copy", attend(then(written_behind_a_copy)), 1, "a write to a copy"),
    Case("memory-channels", attend(channels_first), 1, "components before queries"),
    Case("memory-sdpa", attend(sdpa_viewed), 1, "a view that SDPA's layout allows"),
    Case("memory-bare", bare, 1, "the result leaves the graph"),
)
