"""What leaves a compiled graph lies in memory as what eager gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from parameters.thinned import thinned
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attncc.driver.backend import Collected, collecting


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.3).softmax(-1) @ v


def gated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return by_hand(q, k, v) * torch.sigmoid(q)


def in_another_order(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhij,bhjd->bihd", (q @ k.mT * 0.3).softmax(-1), v)


def with_row_sums(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ k.mT
    return scores.softmax(-1) @ v, scores.logsumexp(-1, keepdim=True)


MODELS = [by_hand, gated, in_another_order, scaled_dot_product_attention, with_row_sums]


@pytest.mark.parametrize(("model", "tokens_first", "dynamic"), thinned(MODELS, [False, True], [False, True]))
def test_strides_are_those_of_eager(model: Callable[..., Tensor], tokens_first: bool, dynamic: bool) -> None:
    torch._dynamo.reset()
    g = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, 9, 3, 8, generator=g) for _ in range(3))
    if tokens_first:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    found = Collected()
    token = collecting.set(found)
    try:
        with torch.no_grad():
            want = model(q, k, v)
            options = {"measure": False}
            got = torch.compile(model, backend="attncc", dynamic=dynamic, options=options)(q, k, v)
    finally:
        collecting.reset(token)
    for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (got, want)), strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b)
    assert [site.status for site in found.sites] == ["fused"]
