"""What a kernel visits under masks that data decides is counted on the inputs of the call."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import attncc


def documents(q: Tensor, k: Tensor, v: Tensor, d: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, attn_mask=d[:, None] == d[None])


def test_documents_are_counted() -> None:
    lengths = torch.tensor([100, 412, 37, 600, 251, 136])
    d = torch.repeat_interleave(torch.arange(6), lengths)
    (site,) = attncc.explain(documents, *torch.randn(3, 1, 4, 1536, 64), d).sites
    assert site.total == 4 * 1536**2
    assert site.visible == 4 * int((lengths**2).sum())
    assert site.visited is not None and site.visible <= site.visited < 0.5 * site.total


def test_a_call_too_small_for_tables_is_counted_as_it_runs() -> None:
    d = torch.repeat_interleave(torch.arange(2), 32)
    (site,) = attncc.explain(documents, *torch.randn(3, 1, 4, 64, 64), d).sites
    assert site.visible == 4 * 2 * 32**2 and site.visited == site.total == 4 * 64**2


def test_layers_of_one_kernel_are_counted_apart() -> None:
    """Layers whose masks differ in their data alone share a kernel, and not what it visits."""

    class Two(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, d: Tensor, e: Tensor) -> Tensor:
            return documents(documents(q, k, v, d), k, v, e)

    one, other = (torch.repeat_interleave(torch.arange(n), 1536 // n) for n in (2, 6))
    found = attncc.explain(Two(), *torch.randn(3, 1, 4, 1536, 64), one, other).sites
    assert [site.visible for site in found] == [4 * 1536**2 // 2, 4 * 1536**2 // 6]
    assert found[0].ir == found[1].ir and found[1].visited < found[0].visited  # type: ignore[operator]
