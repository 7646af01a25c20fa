"""Small programs that together lead a compilation through all that the driver can do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Program:
    """`make` gives a function and its arguments; `dynamic` and `grad` say how it is compiled and run."""

    make: Callable[[], tuple[Callable[..., Tensor], tuple[Tensor, ...]]]
    dynamic: bool | None = None
    grad: bool = False


def _tensors(n: int = 9) -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, 2, n, 16) for _ in range(3))


def two_sites(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A masked softmax written out, and SDPA on what it gives."""
    n = q.shape[-2]
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
    inner = (q @ k.mT * 0.25).masked_fill(hidden, float("-inf")).softmax(-1) @ v
    return F.scaled_dot_product_attention(inner, k, v, is_causal=True)


def in_pieces(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One softmax over two sets of keys, with a product for each."""
    n = k.shape[-2]
    weights = torch.cat([q @ k.mT, q @ v.mT], -1).softmax(-1)
    return weights[..., :n] @ v + weights[..., n:] @ k


def in_einsums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads last in the result, and an einsum of three factors."""
    weights = torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1)
    return torch.einsum("bhij,bhjd,bhje->bihde", weights, k[..., :2], v[..., :3])


def recomputed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Inside a checkpoint, which is a graph of its own."""
    return checkpoint(two_sites, q, k, v, use_reentrant=False)


def mapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.vmap(lambda q, k, v: (q @ k.mT).softmax(-1) @ v)(q, k, v)


def derived(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    inner = torch.func.grad(lambda q: two_sites(q, k, v).square().sum())(q)
    return (inner @ k.mT).softmax(-1) @ v


def under_autocast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        q = q @ q.mT @ q
        with torch.autocast("cpu", enabled=False):
            weights = (q.float() @ k.float().mT / 4).softmax(-1)
        return weights.to(q.dtype) @ v.to(q.dtype)


def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A softmax-like site that stays, and one that is refused."""
    q, k = F.elu(q) + 1, F.elu(k) + 1
    weights = (q @ k.mT).softmax(-1)
    return q @ (k.mT @ v) + weights @ v + weights.amax(-2)[..., None]


def library_layer() -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """One operation of torch's in which the whole layer is."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    return layer, (torch.randn(2, 9, 16),)


def with_weights() -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """A composite call that an edit takes apart."""
    layer = nn.MultiheadAttention(16, 2, batch_first=True)

    def run(x: Tensor, mask: Tensor) -> Tensor:
        return layer(x, x, x, attn_mask=mask, need_weights=False)[0]

    return run, (torch.randn(2, 9, 16), torch.randn(9, 9))


def _of(run: Callable[..., Tensor]) -> Callable[[], Any]:
    return lambda: (run, _tensors())


PROGRAMS: dict[str, Program] = {
    "two sites": Program(_of(two_sites)),
    "sizes that change": Program(_of(two_sites), dynamic=True),
    "trained": Program(_of(two_sites), grad=True),
    "pieces": Program(_of(in_pieces), dynamic=True),
    "einsums": Program(_of(in_einsums)),
    "checkpoint": Program(_of(recomputed), grad=True),
    "vmap": Program(_of(mapped)),
    "torch.func.grad": Program(_of(derived)),
    "autocast": Program(_of(under_autocast)),
    "other sites": Program(_of(linear)),
    "library layer": Program(library_layer),
    "composite call": Program(with_weights, grad=True),
}
