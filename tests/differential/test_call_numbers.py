"""Floats that a call passes: one graph serves every value, and is right for each of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from parameters.thinned import thinned
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

from attncc.driver.backend import Collected, collecting

Q = torch.Tensor
B, H, N, D = 2, 2, 24, 8
VALUES = (0.3, 0.71, 1.9, 0.05)


def distances(n: int) -> Q:
    at = torch.arange(n)
    return (at[:, None] - at).abs()


def near_one(q: Q, k: Q, v: Q, a: float) -> Q:
    """What Python computes from numbers it computes in float64: here single precision loses every digit."""
    return (q @ k.mT * ((1.0 + a * 1e-9) - 1.0) * 1e9).softmax(-1) @ v


def scored_by_flex(q: Q, k: Q, v: Q, a: float) -> Q:
    return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s - a * (i - j).abs())


#: Arguments are queries, keys and values (B, H, N, D) and a float.
MODELS: dict[str, Callable[[Q, Q, Q, float], Q]] = {
    "scale": lambda q, k, v, a: (q @ k.mT * a).softmax(-1) @ v,
    "scale of queries": lambda q, k, v, a: ((q * a) @ k.mT).softmax(-1) @ v,
    "temperature": lambda q, k, v, a: (q @ k.mT / math.sqrt(D) / a).softmax(-1) @ v,
    "temperature of a size": lambda q, k, v, a: (q @ k.mT * (a / math.sqrt(k.shape[-2]))).softmax(-1) @ v,
    "soft cap": lambda q, k, v, a: ((q @ k.mT / a).tanh() * a).softmax(-1) @ v,
    "of two": lambda q, k, v, a: (q @ k.mT * ((a + 1.0) / (2.0 - a * a) + a**0.5)).softmax(-1) @ v,
    "near one": near_one,
    "slope": lambda q, k, v, a: (q @ k.mT - a * distances(q.shape[-2]).to(q.dtype)).softmax(-1) @ v,
    "window": lambda q, k, v, a: (q @ k.mT).masked_fill(distances(q.shape[-2]) > 4.5 * a, -1e9).softmax(-1) @ v,
    "fill": lambda q, k, v, a: (q @ k.mT).masked_fill(distances(q.shape[-2]) > 3, -a).softmax(-1) @ v,
    "weights": lambda q, k, v, a: ((q @ k.mT).softmax(-1) * a) @ v,
    "two softmaxes": lambda q, k, v, a: ((q @ k.mT).softmax(-1) - a * (k @ q.mT).softmax(-1)) @ v,
    "product": lambda q, k, v, a: torch.baddbmm(q[0] * 0 @ k[0].mT, q[0], k[0].mT, alpha=a).softmax(-1) @ v[0],
}
FLEX = {"flex score": scored_by_flex}


def inputs(seed: int, dtype: torch.dtype, *, grad: bool) -> list[Q]:
    generator = torch.Generator().manual_seed(seed)
    x = [torch.randn(B, H, N, D, generator=generator, dtype=torch.float64) for _ in range(3)]
    return [y.to(dtype).requires_grad_(grad) for y in x]


def results(run: Callable[..., Q], x: list[Q], a: float) -> list[Q]:
    out = run(*x, a)
    seed = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    grads = torch.autograd.grad(out, x, seed) if x[0].requires_grad else ()
    return [out.detach(), *grads]


def checked(model: Callable[..., Q], dtype: torch.dtype, *, grad: bool, dynamic: bool | None = None) -> Collected:
    """`model` is right for every value, in at most two graphs; what was found in these."""
    torch._dynamo.reset()
    found = Collected()
    token = collecting.set(found)
    try:
        compiled = torch.compile(model, backend="attncc", options={"measure": False}, dynamic=dynamic)
        for seed, a in enumerate(VALUES):
            x = inputs(seed, dtype, grad=grad)
            double = [y.detach().double().requires_grad_(grad) for y in x]
            exact = results(model, double, a)
            for mine, own, true in zip(results(compiled, x, a), results(model, x, a), exact, strict=True):
                error, eager = ((y.double() - true).abs().max() for y in (mine, own))
                assert error <= 2 * eager + 64 * torch.finfo(dtype).eps * true.abs().max(), f"{a}: {error} {eager}"
    finally:
        collecting.reset(token)
    assert len(found.after) == 2, "one graph for the first value, and one for all others"
    assert [s.status for s in found.sites][-1:] == ["fused"], [s.reason for s in found.sites]
    assert not found.notes
    return found


QUICK = ("scale", "window", "two softmaxes")


@pytest.mark.parametrize("name", [pytest.param(x, marks=[] if x in QUICK else [pytest.mark.full]) for x in MODELS])
def test_one_graph_serves_every_value(name: str) -> None:
    checked(MODELS[name], torch.float32, grad=False)


@pytest.mark.parametrize(
    ("name", "dtype"),
    thinned(["scale", "slope", "two softmaxes"], [torch.float32, torch.float64, torch.bfloat16]),
)
def test_with_gradients(name: str, dtype: torch.dtype) -> None:
    checked(MODELS[name], dtype, grad=True)


@pytest.mark.parametrize("name", ["scale", "temperature of a size"])
def test_with_sizes_that_change(name: str) -> None:
    checked(MODELS[name], torch.float32, grad=False, dynamic=True)


def test_a_score_function_of_flex_attention() -> None:
    checked(FLEX["flex score"], torch.float32, grad=False)


class Scaled(nn.Module):
    """A float that belongs to the module, as most of them do."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 0.25

    def forward(self, q: Q, k: Q, v: Q) -> Q:
        return (q @ k.mT * self.scale).softmax(-1) @ v


def compiled_sites(model: Any, calls: list[list[Any]], dynamic: bool | None = None) -> Collected:
    torch._dynamo.reset()
    found = Collected()
    token = collecting.set(found)
    try:
        compiled = torch.compile(model, backend="attncc", options={"measure": False}, dynamic=dynamic)
        for given in calls:
            torch.testing.assert_close(compiled(*given), model(*given))
    finally:
        collecting.reset(token)
    return found


def test_a_float_that_nobody_has_seen_to_change_is_a_constant() -> None:
    """`dynamic=True` makes floats inputs at once; a constant is folded, and none that changes is one twice."""
    model = Scaled()
    x = inputs(0, torch.float32, grad=False)
    found = compiled_sites(model, [x], dynamic=True)
    assert "s * 0.25" in (found.sites[0].ir or "")
    calls: list[list[Any]] = [[*x, a] for a in VALUES]
    found = compiled_sites(MODELS["scale"], calls, dynamic=True)
    assert len(found.sites) == 2
    assert "s * 0.3" in (found.sites[0].ir or "") and "s * t0" in (found.sites[1].ir or "")


def test_a_scale_that_an_operation_takes_as_a_number_is_guarded_on() -> None:
    """SDPA has its scale as a number, whatever compiles it: Dynamo compiles anew for each."""
    x = inputs(0, torch.float32, grad=False)

    def scaled(q: Q, k: Q, v: Q, a: float) -> Q:
        return nn.functional.scaled_dot_product_attention(q, k, v, scale=a)

    found = compiled_sites(scaled, [[*x, a] for a in VALUES[:3]])
    assert len(found.sites) == 3
    assert all(site.status == "fused" for site in found.sites) and "s * 1.9" in (found.sites[2].ir or "")


def test_scores_divided_by_a_size_in_flex_attention() -> None:
    """Its scale is the root of a size, which may be a symbol."""
    x = inputs(0, torch.float32, grad=False)
    found = compiled_sites(flex_attention, [x], dynamic=True)
    assert [s.status for s in found.sites] == ["fused"]
