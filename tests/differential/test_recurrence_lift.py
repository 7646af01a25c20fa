"""Recurrences over time as models write them: one decoding step, unrolled loops, chunks; and what is none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from reading.lifting import Q, read, values
from torch import nn

from attncc.ir import interpret_linear, parse_linear, print_linear
from attncc.patterns.lift import Refusal, lift_all
from attncc.patterns.linear.linear import Recognised

B, H, T, D, E = 2, 3, 4, 6, 5


class Core(nn.Module):
    def __init__(self, core: Callable[..., object]) -> None:
        super().__init__()
        self.core = core

    def forward(self, *inputs: Q) -> object:
        return self.core(*inputs)


def inputs(steps: int = T) -> tuple[Q, ...]:
    """q, k, v, g, beta by (batch, time, head), and a state."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, steps, H, n) for n in (D, D, E))
    return q, k, v, -torch.rand(B, steps, H), torch.rand(B, steps, H), torch.randn(B, H, D, E)


def gated_delta(q: Q, k: Q, v: Q, g: Q, beta: Q, state: Q) -> tuple[Q, Q]:
    """By elements, as model code falls back to where a kernel is missing."""
    q, k, v, g, beta = (x.transpose(1, 2).contiguous() for x in (q, k, v, g, beta))
    q, k = q * D**-0.5, F.normalize(k, dim=-1)
    outs = []
    for t in range(q.shape[2]):
        state = state * g[:, :, t].exp()[..., None, None]
        held = (state * k[:, :, t, :, None]).sum(-2)
        change = (v[:, :, t] - held) * beta[:, :, t, None]
        state = state + k[:, :, t, :, None] * change[:, :, None]
        outs.append((state * q[:, :, t, :, None]).sum(-2))
    return torch.stack(outs, 2), state


def by_products(q: Q, k: Q, v: Q, g: Q, beta: Q, state: Q) -> tuple[Q, Q]:
    """The same by einsum and matmul."""
    outs = []
    for t in range(q.shape[1]):
        state = g[:, t].exp()[..., None, None] * state
        held = torch.einsum("bhde,bhd->bhe", state, k[:, t])
        state = state + torch.einsum("bhd,bhe->bhde", k[:, t], beta[:, t, :, None] * (v[:, t] - held))
        outs.append((q[:, t, :, None] @ state)[:, :, 0])
    return torch.stack(outs, 1), state


def retention(q: Q, k: Q, v: Q, g: Q, beta: Q, state: Q) -> tuple[Q, Q]:
    """A constant decay for each head, from zeros, outer products by matmul."""
    slopes = 1 - 2.0 ** -torch.arange(1, H + 1)
    state = torch.zeros(B, H, D, E)
    outs = []
    for t in range(q.shape[1]):
        state = state * slopes[:, None, None] + k[:, t, :, :, None] @ v[:, t, :, None]
        outs.append((q[:, t, :, None] @ state)[:, :, 0])
    return torch.stack(outs, 1), state


def selective_scan(q: Q, k: Q, v: Q, g: Q, beta: Q, state: Q) -> tuple[Q, Q]:
    """A state-space model: a decay for each channel and state, the state channel first."""
    a, state, outs = -torch.linspace(1, 2, D), state.mT, []
    for t in range(q.shape[1]):
        dt = beta[:, t, :, None].expand(B, H, E)
        state = (dt[..., None] * a).exp() * state + dt[..., None] * k[:, t, :, None] * v[:, t, ..., None]
        outs.append((state @ q[:, t, :, :, None])[..., 0])
    return torch.stack(outs, 1), state


def of_activations(q: Q, k: Q, v: Q, g: Q, beta: Q, state: Q) -> tuple[Q, Q]:
    """Of tokens that are activations, which no map of one element gives: as Qwen3-Next decodes."""
    return gated_delta(F.silu(q), F.silu(k), F.silu(v) * v.sin(), -F.softplus(g) * beta, beta.sigmoid(), state)


CORES = (gated_delta, by_products, of_activations, retention, selective_scan)


@pytest.mark.parametrize("steps", [1, T])
@pytest.mark.parametrize("core", CORES)
def test_found(core: Callable[..., object], steps: int) -> None:
    facts, shadow, given = read(Core(core), *inputs(steps))
    (site,) = lift_all(facts)
    assert isinstance(site, Recognised)
    assert site.reason.code == ("linear" if steps > 1 else "linear-step")
    a = site.linear
    assert parse_linear(print_linear(a)) == a
    assert (a.rule, a.state is None) == ("delta" if core in CORES[:3] else "add", core is retention)
    held = values(shadow, given)
    tensors = {t.name: held[n.name] for t, n in zip(a.tensors, site.tensors, strict=True)}
    got = interpret_linear(a, tensors, compute=torch.float64)
    names = [x.name for x in (*a.batch, a.d, a.e)]
    want = held[site.node.name]
    state = got["state"].permute([names.index(x) for x in site.axes if x]).reshape(want.shape)
    torch.testing.assert_close(state, want)
    (last,) = site.covered
    torch.testing.assert_close(got["out"][..., -1, :].reshape(held[last.name].shape), held[last.name])


def chunked(q: Q, k: Q, v: Q, g: Q, beta: Q, state: Q) -> tuple[Q, Q]:
    """Two tokens a step: the state is carried between chunks."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    outs = []
    for t in range(0, q.shape[2], 2):
        part = slice(t, t + 2)
        outs.append(q[:, :, part] @ state)
        state = state * 0.9 + k[:, :, part].mT @ v[:, :, part]
    return torch.cat(outs, 2), state


def read_once(q: Q, k: Q, v: Q, g: Q, beta: Q, state: Q) -> Q:
    for t in range(q.shape[1]):
        state = state * 0.9 + k[:, t, :, :, None] * v[:, t, :, None]
    return (state * q[:, 0, :, :, None]).sum(-2)


def forgets_another(q: Q, k: Q, v: Q, g: Q, beta: Q, state: Q) -> Q:
    """What is subtracted is what the state held for the query."""
    for t in range(q.shape[1]):
        held = (state * q[:, t, :, :, None]).sum(-2)
        state = state + k[:, t, :, :, None] * (v[:, t] - held)[:, :, None]
    return (state * q[:, 0, :, :, None]).sum(-2)


def forgets_early(q: Q, k: Q, v: Q, g: Q, beta: Q, state: Q) -> Q:
    """What is subtracted was held before the decay."""
    outs = []
    for t in range(q.shape[1]):
        held = (state * k[:, t, :, :, None]).sum(-2)
        state = state * g[:, t].exp()[..., None, None] + k[:, t, :, :, None] * (v[:, t] - held)[:, :, None]
        outs.append((state * q[:, t, :, :, None]).sum(-2))
    return torch.stack(outs, 1)


def uneven(q: Q, k: Q, v: Q, g: Q, beta: Q, state: Q) -> Q:
    """Every step reads the token of another order."""
    outs = []
    for t in (0, 2, 1, 3):
        state = state * 0.9 + k[:, t, :, :, None] * v[:, t, :, None]
        outs.append((state * q[:, t, :, :, None]).sum(-2))
    return torch.stack(outs, 1)


@pytest.mark.parametrize(
    ("core", "reason"),
    [
        (chunked, "a state carried over 2 chunks of tokens"),
        (read_once, "no query reads its state"),
        (forgets_another, "not what its state holds for the key"),
        (forgets_early, "not what its state holds for the key"),
        (uneven, "its steps read different tensors"),
    ],
)
def test_refused(core: Callable[..., object], reason: str) -> None:
    facts, *_ = read(Core(core), *inputs())
    (site,) = lift_all(facts)
    assert isinstance(site, Refusal)
    assert site.reason.code.startswith("recurrence")
    assert reason in str(site.reason)


def average(q: Q, k: Q, v: Q, g: Q, beta: Q, state: Q) -> Q:
    """A moving average of tokens: nothing is looked up."""
    mean = q[:, 0]
    for t in range(1, q.shape[1]):
        mean = 0.9 * mean + 0.1 * q[:, t]
    return mean @ k[:, 0].mT


def residual(q: Q, k: Q, v: Q, g: Q, beta: Q, state: Q) -> Q:
    """A gated vector added to every token."""
    x = state + beta[:, 0, :, None, None] * v[:, 0, :, None]
    return x @ torch.ones(E, E)


def positions(q: Q, k: Q, v: Q, g: Q, beta: Q, state: Q) -> Q:
    """Rows and columns added to a map that is multiplied with itself."""
    x = state + torch.arange(D)[:, None] * torch.linspace(0, 1, E)
    return (x @ x.mT).softmax(-1) @ x


@pytest.mark.parametrize("core", [average, residual, positions])
def test_no_recurrence(core: Callable[..., object]) -> None:
    facts, *_ = read(Core(core), *inputs())
    sites = lift_all(facts)
    assert not [x for x in sites if isinstance(x, Recognised) or "recurrence" in getattr(x, "reason", "")]
