"""Linear attention as models write it: recognised, its IR gives the model's numbers in float64, and what looks like it
is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reading.lifting import Q, read, values
from torch import nn

from attncc.driver.baseline import hint
from attncc.ir import Const, interpret_linear, parse_linear, print_linear
from attncc.patterns.graph.facts import Facts
from attncc.patterns.lift import Refusal, lift_all
from attncc.patterns.linear.linear import Recognised

B, H, N, D = 2, 4, 21, 8


class Attend(nn.Module):
    def __init__(self, core: Callable[..., Q]) -> None:
        super().__init__()
        self.qkv, self.core = nn.Linear(H * D, 3 * H * D), core
        self.small = nn.Parameter(torch.randn(D, D))

    def forward(self, x: Q) -> Q:
        q, k, v = self.qkv(x).view(B, -1, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
        return self.core(q, k, v, self.small) * 2


def bare(q: Q, k: Q, v: Q, w: Q) -> Q:
    return q @ (k.mT @ v)


def galerkin(q: Q, k: Q, v: Q, w: Q) -> Q:
    k, v = (F.layer_norm(x, (D,)) for x in (k, v))
    return q @ (k.mT @ v / k.shape[-2])


def ones_column(q: Q, k: Q, v: Q, w: Q) -> Q:
    out = F.relu(q) @ (F.relu(k).mT @ F.pad(v, (0, 1), value=1.0))
    return out[..., :-1] / (out[..., -1:] + 1e-6)


def ones_row(q: Q, k: Q, v: Q, w: Q) -> Q:
    """Channels first, as in image models."""
    q, k, v = F.relu(q).mT, F.relu(k), F.pad(v.mT, (0, 0, 0, 1), value=1.0)
    out = v @ k @ q
    return (out[:, :, :-1] / (out[:, :, -1:] + 1e-15)).mT


def by_einsum(q: Q, k: Q, v: Q, w: Q) -> Q:
    """Katharopoulos et al., as published."""
    q, k, v = F.elu(q).transpose(1, 2) + 1, F.elu(k).transpose(1, 2) + 1, v.transpose(1, 2)
    state = torch.einsum("nshd,nshm->nhmd", k, v)
    z = 1 / (torch.einsum("nlhd,nhd->nlh", q, k.sum(dim=1)) + 1e-6)
    return torch.einsum("nlhd,nhmd,nlh->nlhm", q, state, z).transpose(1, 2)


def scaled_values(q: Q, k: Q, v: Q, w: Q) -> Q:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    state = torch.einsum("nhsd,nhsv->nhdv", k, v / N)
    z = 1 / (torch.einsum("nhld,nhd->nhl", q, k.sum(dim=2)) + 1e-6)
    return torch.einsum("nhld,nhdv,nhl->nhlv", q, state, z) * N


def summed_elements(q: Q, k: Q, v: Q, w: Q) -> Q:
    q, k = q.exp(), k.exp()
    return (q @ (k.mT @ v)) / (q * k.sum(-2, keepdim=True)).sum(-1, keepdim=True).clamp(min=1e-3)


def reciprocal(q: Q, k: Q, v: Q, w: Q) -> Q:
    q, k = q.sigmoid(), k.sigmoid()
    return (q @ (k.mT @ v)) * (1 / (q @ k.sum(-2).unsqueeze(-1) + 1e-6))


def efficient(q: Q, k: Q, v: Q, w: Q) -> Q:
    """Shen et al.: softmax over channels and over tokens."""
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


def running(q: Q, k: Q, v: Q, w: Q) -> Q:
    """Causal, by running sums of outer products."""
    q, k = F.elu(q) + 1, F.elu(k) + 1
    state = torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(2)
    z = 1 / (torch.einsum("bhnd,bhnd->bhn", q, k.cumsum(2)) + 1e-6)
    return torch.einsum("bhnd,bhnde,bhn->bhne", q, state, z)


def running_by_matmul(q: Q, k: Q, v: Q, w: Q) -> Q:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    state = (k[..., :, None] * v[..., None, :]).cumsum(-3)
    return (q[..., None, :] @ state)[..., 0, :] / (q * k.cumsum(-2)).sum(-1, keepdim=True).clamp(min=1e-6)


def running_unnormalised(q: Q, k: Q, v: Q, w: Q) -> Q:
    return (q[..., None] * (k[..., None] * v[..., None, :]).cumsum(2)).sum(-2)


def random_features(q: Q, k: Q, v: Q, w: Q) -> Q:
    """Performers (Choromanski et al., 2020, arXiv 2009.14794), as published: einsums under an ellipsis."""

    def features(x: Q, dims: tuple[int, ...]) -> Q:
        hashed = torch.einsum("...id,jd->...ij", x * D**-0.25, w)
        length = (x**2).sum(-1, keepdim=True) / 2 * D**-0.5
        return D**-0.5 * (torch.exp(hashed - length - hashed.amax(dims, keepdim=True)) + 1e-4)

    q, k = features(q, (-1,)), features(k, (-1, -2))
    z = 1.0 / torch.einsum("...nd,...d->...n", q, k.sum(-2))
    state = torch.einsum("...nd,...ne->...de", k, v)
    return torch.einsum("...de,...nd,...n->...ne", state, q, z)


def in_bfloat16(q: Q, k: Q, v: Q, w: Q) -> Q:
    q, k, v = (x.bfloat16() for x in (q, k, v))
    return (F.relu(q) @ (F.relu(k).mT @ v)).float()


FOUND = (bare, galerkin, ones_column, ones_row, by_einsum, scaled_values, summed_elements, reciprocal, efficient,
         running, running_by_matmul, running_unnormalised, random_features)  # fmt: skip
DIVIDED = {ones_column, ones_row, by_einsum, scaled_values, summed_elements, reciprocal, running, running_by_matmul,
           random_features}  # fmt: skip


def agrees(site: Recognised, facts: Facts, held: dict[str, Any]) -> None:
    """The IR's output, in float64, is what the site's node holds."""
    a = parse_linear(print_linear(site.linear))
    assert a == site.linear
    tensors = {t.name: held[n.name] for t, n in zip(a.tensors, site.tensors, strict=True)}
    sizes = [hint(s, facts) for s in site.sizes]
    got = interpret_linear(a, tensors, sizes, compute=torch.float64)["out"]
    names = [x.name for x in (*a.batch, a.i, a.e)]
    want = held[site.node.name]
    order = [names.index(name) for name in site.axes if name]
    torch.testing.assert_close(got.permute(order).reshape(want.shape), want)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("core", FOUND)
def test_found(core: Callable[..., Q], dynamic: bool) -> None:
    torch.manual_seed(0)
    facts, shadow, inputs = read(Attend(core), torch.randn(B, N, H * D), dynamic=dynamic)
    (site,) = lift_all(facts)
    assert isinstance(site, Recognised)
    assert (site.linear.over is not None) == (core in DIVIDED)
    if core is not in_bfloat16:
        agrees(site, facts, values(shadow, inputs))


def quadratic(q: Q, k: Q, v: Q, w: Q) -> Q:
    return q @ k.mT @ v


def quadratic_features(q: Q, k: Q, v: Q, w: Q) -> Q:
    return F.relu(q) @ F.relu(k).mT @ v


def dot_product(q: Q, k: Q, v: Q, w: Q) -> Q:
    """A non-local block without a softmax."""
    return q @ k.mT / N @ v


@pytest.mark.parametrize("core", [quadratic, quadratic_features, dot_product])
def test_written_with_a_weight_for_each_pair(core: Callable[..., Q]) -> None:
    torch.manual_seed(0)
    facts, shadow, given = read(Attend(core), torch.randn(B, N, H * D))
    (site,) = lift_all(facts)
    assert isinstance(site, Recognised)
    assert site.reason.code == "linear-written-out"
    assert (site.linear.i.extent, site.linear.d.extent) == (Const(N), Const(D))
    agrees(site, facts, values(shadow, given))


def low_rank(q: Q, k: Q, v: Q, w: Q) -> Q:
    return q @ (w @ w.mT) + k @ w @ w


def perceptron(q: Q, k: Q, v: Q, w: Q) -> Q:
    return F.relu(q @ w) @ w


def bilinear(q: Q, k: Q, v: Q, w: Q) -> Q:
    """Pooled products of two maps, then a layer."""
    return (k.mT @ v) @ w


def pseudo_inverse(q: Q, k: Q, v: Q, w: Q) -> Q:
    a = (q.mT @ k * 0.1).softmax(-1)
    inverse, one = a.mT / a.abs().sum(-2).amax(), torch.eye(D)
    for _ in range(2):
        inverse = inverse @ (2 * one - a @ inverse)
    return q @ inverse


def gram(q: Q, k: Q, v: Q, w: Q) -> Q:
    """A power of a covariance."""
    covariance = q.mT @ q / N
    return covariance @ (covariance @ covariance)


def softmax_first(q: Q, k: Q, v: Q, w: Q) -> Q:
    return (q @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize(
    "core", [low_rank, perceptron, bilinear, pseudo_inverse, gram, softmax_first]
)
def test_not_taken_for_one(core: Callable[..., Q]) -> None:
    torch.manual_seed(0)
    facts, *_ = read(Attend(core), torch.randn(B, N, H * D))
    assert not [site for site in lift_all(facts) if isinstance(site, Recognised)]


def other_sum(q: Q, k: Q, v: Q, w: Q) -> Q:
    """Divided by the sum of something else: that is no part of the attention."""
    q, k = q.sigmoid(), k.sigmoid()
    return (q @ (k.mT @ v)) / (q @ v.sum(-2).unsqueeze(-1))


def other_row(q: Q, k: Q, v: Q, w: Q) -> Q:
    """Divided by the sum of the row before."""
    q, k = q.sigmoid(), k.sigmoid()
    return (q @ (k.mT @ v)) / (q @ k.sum(-2).unsqueeze(-1)).roll(1, 2)


def other_column(q: Q, k: Q, v: Q, w: Q) -> Q:
    """Divided by a column that holds no ones."""
    out = F.relu(q) @ (F.relu(k).mT @ F.pad(v, (0, 1), value=2.0))
    return out[..., :-1] / out[..., -1:]


@pytest.mark.parametrize("core", [other_sum, other_row, other_column])
def test_a_quotient_by_another_sum_stays_outside(core: Callable[..., Q]) -> None:
    torch.manual_seed(0)
    facts, shadow, inputs = read(Attend(core), torch.randn(B, N, H * D))
    sites = [site for site in lift_all(facts) if not isinstance(site, Refusal)]
    (site,) = sites
    assert isinstance(site, Recognised)
    assert site.linear.over is None
    agrees(site, facts, values(shadow, inputs))


def test_a_residual_stream_is_no_recurrence() -> None:
    """Two layers of attention that add to one stream, projected by a tensor that is no parameter."""

    def layers(x: Q, w: Q) -> Q:
        for _ in range(2):
            q, k, v = (t.unflatten(-1, (H, D)).transpose(1, 2) for t in (x @ w).chunk(3, -1))
            x = x + ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return x

    facts, *_ = read(layers, torch.randn(B, N, H * D), torch.randn(H * D, 3 * H * D))  # type: ignore[arg-type]
    sites = lift_all(facts)
    assert len(sites) == 2 and not any(isinstance(x, Refusal | Recognised) for x in sites)
