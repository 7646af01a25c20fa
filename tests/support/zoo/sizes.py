"""Numbers made of sizes that are known at the call only: scales by the number of keys."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from zoo.case import Case, Made, lively
from zoo.spellings import Attend, Core, D, Extra, H, Q


def by_root(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    return (q @ k.mT / math.sqrt(k.shape[2])).softmax(-1) @ v


def by_number_of_keys(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    """Scores that grow with the number of keys, slopes over the whole length."""
    n = k.shape[2]
    distance = (torch.arange(n)[:, None] - torch.arange(n)).abs().to(q.dtype)
    return (q @ k.mT * (n**0.25 * q.shape[-1] ** -0.5 + 1 / n) - 2.0 * distance / n).softmax(-1) @ v


def by_alpha(q: Q, k: Q, v: Q, extra: Extra) -> Q:
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    scores = torch.baddbmm(q.new_zeros(1, 1, 1), flat[0], flat[1].mT, beta=0, alpha=k.shape[2] ** -0.5)
    return (scores.softmax(-1) @ flat[2]).view_as(q)


class Headed(Attend):
    """The same on ids, (B, N), which are run at two lengths."""

    def __init__(self, core: Core) -> None:
        super().__init__(core, {})
        self.embed = nn.Embedding(9, H * D)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(self.embed(ids))


def of_ids(core: Core) -> Callable[[], Made]:
    return lambda: (lively(Headed(core)), (torch.arange(42).view(2, 21) * 5 % 9,), {})


WIDE = (torch.float32, torch.bfloat16)

SIZES = (
    Case("root-of-keys", of_ids(by_root), 1, "divided by the root of a size", dynamic=True, golden=0),
    Case("number-of-keys", of_ids(by_number_of_keys), 1, "times the root of a length", dynamic=True, golden=0,
         dtypes=WIDE, backward=True),
    Case("alpha-of-keys", of_ids(by_alpha), 1, "a size as the factor of baddbmm", dynamic=True),
)  # fmt: skip
