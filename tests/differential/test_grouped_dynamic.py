"""Grouped heads of `scaled_dot_product_attention`, whose numbers are known when compiling or at the call alone."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F

DYNAMIC = ["none", "queries", "both"]


@pytest.mark.parametrize(("heads", "dynamic"), list(product([(4, 2), (6, 2), (4, 1), (4, 4)], DYNAMIC)))
def test_heads_share_keys_in_groups(heads: tuple[int, int], dynamic: str) -> None:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    torch._dynamo.reset()
    compiled = torch.compile(attention, backend="attncc", options={"measure": False, "inductor": False})
    for length, times in ((19, 1), (33, 2)):
        torch.manual_seed(length)
        q = torch.randn(2, heads[0] * (times if dynamic != "none" else 1), length, 8)
        k, v = torch.randn(2, 2, heads[1] * (times if dynamic == "both" else 1), length, 8)
        if dynamic != "none":
            torch._dynamo.maybe_mark_dynamic(q, 1)
        if dynamic == "both":
            for x in (k, v):
                torch._dynamo.maybe_mark_dynamic(x, 1)
        wanted = attention(*(x.double() for x in (q, k, v)))
        torch.testing.assert_close(compiled(q, k, v).double(), wanted, rtol=1e-4, atol=1e-5)
