"""Masks that a model holds or is given as tensors: looked at once a call, they bound the kernel's loop."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from masks.bounds import blocks, check_sound
from torch import nn
from torch.nn import functional as F

from attncc.driver.backend import Collected, collecting
from attncc.ir import parse_attention
from attncc.kernels.build import built, optimise
from attncc.kernels.skip_tables import Tabled
from attncc.passes.tables.spans import spanned, tables

N = 1024
_I = torch.arange(N)
BAND = (_I[:, None] - _I).abs() < 64


class Buffer(nn.Module):
    """A triangle of ones and zeros kept as a buffer, as minGPT and its many descendants have it."""

    bias: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.register_buffer("bias", torch.tril(torch.ones(N, N)).view(1, 1, N, N))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, c = x.shape
        q, k, v = (y.view(b, t, 2, 16).transpose(1, 2) for y in self.qkv(x).split(32, 2))
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(16)
        scores = scores.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
        return (F.softmax(scores, -1) @ v).transpose(1, 2).reshape(b, t, c)


def given(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def beside_padding(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, kept: torch.Tensor
) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None, None] & kept[:, None, None, :])


def operands() -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, N, 16, generator=g) for _ in range(3)]


def compiled(
    f: Callable[..., torch.Tensor], args: list[torch.Tensor]
) -> tuple[torch.Tensor, Tabled, str]:
    """The result of the one site of `f`, its kernel and its text."""
    torch._dynamo.reset()
    found = Collected()
    token = collecting.set(found)
    try:
        with torch.no_grad():
            result = torch.compile(f, backend="attncc", options={"inductor": False, "measure": False})(*args)
    finally:
        collecting.reset(token)
    (site,) = found.sites
    kernel = built(site.ir or "", "cpu").kernel
    assert site.status == "fused" and isinstance(kernel, Tabled) and kernel.found.maps
    return result, kernel, site.ir or ""


def test_a_buffer() -> None:
    torch.manual_seed(0)
    model, x = Buffer().eval(), torch.randn(1, N, 32)
    with torch.no_grad():
        found, _, _ = compiled(model, [x])
        torch.testing.assert_close(found, model(x), rtol=1e-5, atol=2e-6)
        model.bias[..., 500:] = 0  # written to between two calls
        again = torch.compile(model, backend="attncc", options={"inductor": False, "measure": False})(x)
        torch.testing.assert_close(again, model(x), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("f", "masks", "loaded"),
    [
        (given, [BAND], {"t0": BAND}),
        (given, [torch.where(BAND, 0.0, -torch.inf)], {"t0": torch.where(BAND, 0.0, -torch.inf)}),
        (beside_padding, [BAND, _I[None] < N - 200], {"t0": BAND, "t1": _I[None] < N - 200}),
    ],
    ids=["booleans", "floats", "beside padding"],
)
def test_a_mask_as_input(
    f: Callable[..., torch.Tensor], masks: list[torch.Tensor], loaded: dict[str, torch.Tensor]
) -> None:
    args = [*operands(), *masks]
    result, kernel, text = compiled(f, args)
    torch.testing.assert_close(result, f(*args), rtol=1e-5, atol=2e-6)
    a = optimise(parse_attention(text))
    found = spanned(a, by_looking="quick")
    assert kernel.found.bounds == found.bounds
    tensors = {name: x for name, x in loaded.items() if name in {t.name for t in a.tensors}}
    tensors |= {t.name: x for t, x in zip(a.tensors, operands(), strict=False) if t.name not in tensors}
    made = tables(found, tensors)
    visited, some, full, every = check_sound(found.attention, found.bounds, (), tensors | made, 64)
    assert torch.equal(blocks(visited, 16), blocks(some, 16))
    if len(masks) == 1:
        assert torch.equal(blocks(full, 16, "all"), blocks(every, 16, "all"))
