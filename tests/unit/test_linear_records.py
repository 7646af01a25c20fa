"""What reports say of linear attentions: equation, mask, shapes, the graph's own names, the graph around."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

import attncc
from attncc.driver.describe import linear_equation
from attncc.ir import parse_linear

TEXT = """linear
batch  b = 2
axis   i = 8, j = 8, d = 4, e = 4
tensor q: f32[2, 8, 4]
tensor g: f32[2, 8]
q      q[b, i, d]
k      q[b, j, d]
v      q[b, j, e]
phi_q  x
phi_k  exp(x)
decay  exp(g[b, j])
rate   g[b, j] + 1.0
rule   delta
sees   past
give   out
dtype  f32
"""


def test_equations() -> None:
    a = parse_linear(TEXT)
    assert linear_equation(a) == (
        "S = exp(g[b, j]) * S + exp(k) (g[b, j] + 1.0) * (v - (exp(g[b, j]) * S)^T exp(k)), out = q S"
    )
    plain = parse_linear(TEXT.replace("exp(g[b, j])", "1.0").replace("g[b, j] + 1.0", "1.0").replace("delta", "add"))
    assert linear_equation(plain) == "S = S + exp(k) v, out = q S"
    assert linear_equation(replace(plain, sees="all")) == "q (exp(k)^T v)"


@torch.no_grad()
def test_a_report_of_a_linear_attention() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        fq, fk = F.elu(q) + 1, F.elu(k) + 1
        return (fq @ (fk.mT @ v)) / (fq @ fk.sum(-2, keepdim=True).mT)

    inputs = torch.randn(3, 2, 4, 64, 16, generator=torch.Generator().manual_seed(0))
    (site,) = attncc.explain(attention, *inputs).sites
    assert site.equation == (
        "f(q) (f(k)^T v) / z, f(x) = where(0.0 < x, x, exp(x) - 1.0) + 1.0, z the sum of weights"
    )
    assert site.mask == "all" and site.shapes == dict.fromkeys("qkv", (2, 4, 64, 16))
    assert site.graph and site.graph[-1].role in ("site", "user")


def test_a_report_says_what_computes_gradients() -> None:
    def step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> Tensor:
        outs: list[Tensor] = []
        for t in range(3):
            state = state * g[:, t, None, None].exp() + k[:, t, :, None] * v[:, t, None]
            outs.append((q[:, t, :, None] * state).sum(1))
        return torch.stack(outs, 1)

    q, k, v = torch.randn(3, 2, 3, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    torch._dynamo.reset()
    with attncc.record() as found:
        compiled = torch.compile(step, backend="attncc", options={"measure": False})
        compiled(q, k, v, torch.full((2, 3), -0.5), torch.zeros(2, 8, 8))
    (site,) = (x for x in found.sites if x.equation)
    assert site.trains and site.status == "fused" and site.backward
    assert (site.backward_kernel is None) == ("plain torch" in site.backward)


@torch.no_grad()
def test_results_lie_as_the_model_has_them_where_views_tell() -> None:
    """The operator gives all rows in one tensor; a row of it is no tensor that the model could see flat."""
    def steps(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        state, outs = torch.zeros(2, 8, 8), list[Tensor]()
        for t in range(3):
            state = state * g[:, t, None, None].exp() + k[:, t, :, None] * v[:, t, None]
            outs.append((q[:, t, :, None] * state).sum(1))
        return outs[1].view(-1), outs[2]

    q, k, v = torch.randn(3, 2, 3, 8, generator=torch.Generator().manual_seed(0))
    g = torch.full((2, 3), -0.5)
    torch._dynamo.reset()
    with attncc.record() as found:
        got = torch.compile(steps, backend="attncc", options={"measure": False})(q, k, v, g)
    assert [x.status for x in found.sites if x.equation] == ["fused"]
    for x, want in zip(got, steps(q, k, v, g), strict=True):
        assert x.stride() == want.stride()
        torch.testing.assert_close(x, want)


@torch.no_grad()
def test_a_state_that_a_product_over_batches_made_one_reads() -> None:
    """A step of Mamba-2, as transformers has it: groups share keys and queries, and heads are a part of the batch."""
    def update(state: Tensor, x: Tensor, dt: Tensor, a: Tensor, k: Tensor, q: Tensor) -> Tensor:
        k = k.reshape(2, 2, 1, 8).expand(2, 2, 2, 8).contiguous().reshape(2, 4, 1, 8)
        new = state * torch.exp(dt[..., None] * a) + dt[..., None] * k * x[..., None]
        state.copy_(new)
        q = q.reshape(2, 2, 1, 8).expand(2, 2, 2, 8).contiguous().reshape(2, 4, 8)
        return torch.bmm(new.view(8, 16, 8), q.view(8, 8, 1)).view(2, 4, 16)

    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 16, 8), (2, 4, 16), (2, 4, 16), (4, 16, 8), (2, 2, 8), (2, 2, 8))
    state, x, dt, a, k, q = (torch.randn(s, generator=generator) for s in shapes)
    own, other = state.clone(), state.clone()
    torch._dynamo.reset()
    with attncc.record() as found:
        got = torch.compile(update, backend="attncc", options={"measure": False})(own, x, dt.abs(), -a.abs(), k, q)
    assert [(s.status, "exp(" in s.equation) for s in found.sites] == [("fused", True)]
    torch.testing.assert_close(got, update(other, x, dt.abs(), -a.abs(), k, q))
    torch.testing.assert_close(own, other)
