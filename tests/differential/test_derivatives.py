"""Derivatives of every kind through a compiled attention, in float64: gradcheck, one gradient at a time and in batches,
gradients of gradients, forward mode, and `torch.func`; and gradients as compiled autograd runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._functorch import config as functorch
from torch.autograd import gradcheck, gradgradcheck

from attncc.driver.backend import Collected, collecting

Q = torch.Tensor
N, D = 6, 4


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def plain(q: Q, k: Q, v: Q, *_: Q) -> Q:
    return (q @ k.mT * 0.5).softmax(-1) @ v


def causal(q: Q, k: Q, v: Q, *_: Q) -> Q:
    at = torch.arange(N)
    return (q @ k.mT * 0.5).masked_fill(at > at[:, None], -torch.inf).softmax(-1) @ v


def biased(q: Q, k: Q, v: Q, bias: Q, slope: Q) -> Q:
    """A table by distance, a slope for each head, and a soft cap that learns."""
    at = torch.arange(N)
    scores = q @ k.mT * 0.5 + bias[(at - at[:, None]).clamp(-2, 2) + 2]
    scores = 3 * (scores / 3).tanh() - slope[:, None, None] * (at[:, None] - at).abs()
    return scores.softmax(-1) @ v


def empty_rows(q: Q, k: Q, v: Q, *_: Q) -> Q:
    at = torch.arange(N)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(at < at[:, None]))


def sink(q: Q, k: Q, v: Q, bias: Q, slope: Q) -> Q:
    scores = torch.cat([q @ k.mT * 0.5, slope[None, :, None, None].expand(q.shape[0], -1, N, 1)], -1)
    return scores.softmax(-1)[..., :-1] @ v


FORMS: dict[str, Callable[..., Q]] = {x.__name__: x for x in (plain, causal, biased, empty_rows, sink)}


def given(*, grad: bool = True) -> list[Q]:
    g = torch.Generator().manual_seed(0)
    shapes = [(1, 2, N, D)] * 3 + [(5,), (2,)]
    return [torch.randn(s, generator=g, dtype=torch.float64).requires_grad_(grad) for s in shapes]


def used(name: str) -> list[int]:
    return {"biased": [0, 1, 2, 3, 4], "sink": [0, 1, 2, 4]}.get(name, [0, 1, 2])


def compiled(name: str, *, inductor: bool) -> tuple[Callable[..., Q], list[Q]]:
    """The compiled form as a function of what it reads, with that; the site is fused."""
    tensors, form = given(), FORMS[name]
    found = Collected()
    token = collecting.set(found)
    run = torch.compile(form, backend="attncc", options={"measure": False, "inductor": inductor})
    try:
        run(*tensors)
    finally:
        collecting.reset(token)
    assert [x.status for x in found.sites] == ["fused"]
    at = used(name)

    def of_used(*some: Q) -> Q:
        full = list(tensors)
        for n, x in zip(at, some, strict=True):
            full[n] = x
        return run(*full)

    return of_used, [tensors[n] for n in at]


@functorch.patch(donated_buffer=False)
@pytest.mark.parametrize(
    ("name", "inductor"),
    [("causal", False), pytest.param("biased", True, marks=pytest.mark.full),
     *(pytest.param(x, False, marks=pytest.mark.full) for x in FORMS if x != "causal")],
)  # fmt: skip
def test_gradients_by_differences(name: str, inductor: bool) -> None:
    f, x = compiled(name, inductor=inductor)
    assert gradcheck(f, x, check_batched_grad=True, nondet_tol=0.0)


@pytest.mark.full
@pytest.mark.parametrize("name", FORMS)
def test_gradients_of_gradients_by_differences(name: str) -> None:
    f, x = compiled(name, inductor=False)
    assert gradgradcheck(f, x, check_batched_grad=False)


@pytest.mark.parametrize("name", [x if x == "sink" else pytest.param(x, marks=pytest.mark.full) for x in FORMS])
def test_forward_mode_by_differences(name: str) -> None:
    f, x = compiled(name, inductor=False)
    assert gradcheck(f, x, check_forward_ad=True, check_backward_ad=False)


def per_sample(form: Callable[..., Q]) -> Callable[..., Any]:
    def loss(q: Q, k: Q, v: Q, bias: Q, slope: Q) -> Q:
        return form(q[None], k[None], v[None], bias, slope).sin().sum()

    return torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)), in_dims=(0, 0, 0, None, None))


def jacobian(form: Callable[..., Q]) -> Callable[..., Any]:
    return lambda *x: torch.func.jacrev(form, argnums=(0, 1))(*x)


def product_forward(form: Callable[..., Q]) -> Callable[..., Any]:
    return lambda *x: torch.func.jvp(lambda q: form(q, *x[1:]), (x[0],), (x[0].cos(),))


def product_backward(form: Callable[..., Q]) -> Callable[..., Any]:
    def run(*x: Q) -> Any:
        out, back = torch.func.vjp(form, *x)
        return out, back(out.cos())[:3]

    return run


def second(form: Callable[..., Q]) -> Callable[..., Any]:
    def loss(slope: Q, x: list[Q]) -> Q:
        return form(*x[:4], slope).square().sum()

    return lambda *x: torch.func.hessian(loss)(x[4], list(x))


TRANSFORMS = (per_sample, jacobian, product_forward, product_backward, second)


READS = {x: "biased" if x == "second" else "causal" for x in (x.__name__ for x in TRANSFORMS)}


@pytest.mark.parametrize(
    ("around", "name"),
    [*READS.items(), *(pytest.param(x, name, marks=pytest.mark.full) for x in READS for name in ("biased", "sink")
                       if name != READS[x] and x != "second")],
)  # fmt: skip
@pytest.mark.parametrize("inside", [False, pytest.param(True, marks=pytest.mark.full)])
def test_functions_of_functions(around: str, name: str, inside: bool) -> None:
    """Around a compiled form, and compiled with it."""
    transform = next(x for x in TRANSFORMS if x.__name__ == around)
    form, x = FORMS[name], given(grad=False)
    options = {"measure": False, "inductor": False}
    if inside:
        got = torch.compile(transform(form), backend="attncc", options=options)(*x)
    else:
        got = transform(torch.compile(form, backend="attncc", options=options))(*x)
    torch.testing.assert_close(got, transform(form)(*x), rtol=1e-9, atol=1e-11)


@pytest.mark.full
@pytest.mark.parametrize("name", ["biased", "causal"])
def test_compiled_autograd(name: str) -> None:
    """The backward of the graph is itself compiled: its kernels are operators in it."""
    f, x = compiled(name, inductor=True)
    exact = given()
    want = torch.autograd.grad(FORMS[name](*exact).square().sum(), [exact[n] for n in used(name)])
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        for _ in range(2):
            for t in x:
                t.grad = None
            f(*x).square().sum().backward()
            for t, w in zip(x, want, strict=True):
                assert t.grad is not None
                torch.testing.assert_close(t.grad, w, rtol=1e-9, atol=1e-11)
