"""Gradients of rows whose scores are all far from zero: in float32 the logarithm of their sum has lost the last digits
of their weights, which the kernel divides by what they sum to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cpp_kernels.build import host_isas

from attncc.driver.backend import Collected, collecting

Q = torch.Tensor
OFFSETS = (0.0, -100.0, 3000.0, -1e4, 1e7)


def filled(q: Q, k: Q, v: Q, offset: float) -> Q:
    """Rows of which all keys are filled see them alike."""
    hidden = torch.zeros(q.shape[-2], 1, dtype=torch.bool)
    hidden[3::4] = True
    return (q @ k.mT * 0.25).masked_fill(hidden, offset).softmax(-1) @ v


def moved(q: Q, k: Q, v: Q, offset: float) -> Q:
    at = torch.arange(q.shape[-2])
    return ((q @ k.mT * 0.25) + offset).masked_fill(at > at[:, None], -torch.inf).softmax(-1) @ v


def capped(q: Q, k: Q, v: Q, offset: float) -> Q:
    return (offset + 3 * (q @ k.mT * 0.1).tanh()).softmax(-1) @ v


def gradients(f: Callable[..., Q], tensors: list[Q]) -> list[Q]:
    x = [t.detach().clone().requires_grad_() for t in tensors]
    out = f(*x)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
    return [g.double() for g in torch.autograd.grad((out * weights.to(out.dtype)).sum(), x)]


CASES = [
    pytest.param(form, offset, isa, marks=[] if (form, offset, n) == (filled, -1e4, 0) else [pytest.mark.full])
    for form in (filled, moved, capped) for offset in OFFSETS for n, isa in enumerate(host_isas(every=True))
]  # fmt: skip


@pytest.mark.parametrize(("form", "offset", "isa"), CASES)
def test_gradients(form: Callable[..., Q], offset: float, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNCC_ISA", isa)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, 2, 70, 16, generator=generator) for _ in range(3)]
    torch._dynamo.reset()
    run = torch.compile(form, backend="attncc", options={"inductor": False, "measure": False})
    found = Collected()
    token = collecting.set(found)
    try:
        got = gradients(lambda *x: run(*x, offset), tensors)
    finally:
        collecting.reset(token)
    (site,) = found.sites
    assert site.status == "fused" and "kernel" in site.backward
    own = gradients(lambda *x: form(*x, offset), tensors)
    exact = gradients(lambda *x: form(*x, offset), [t.double() for t in tensors])
    for name, g, o, w in zip("qkv", got, own, exact, strict=True):
        size, error, eager = (float(x.square().mean().sqrt()) for x in (w, g - w, o - w))
        assert error <= 2 * eager + 2.0**-22 * size, f"d{name}: {error / size:.2g}, eager {eager / size:.2g}"
