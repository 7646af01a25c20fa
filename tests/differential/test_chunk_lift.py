"""Linear attention by chunks as models write it: one node, which gives the model's numbers; and what is none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from reading.lifting import Q, read, values
from torch import nn

import attncc
from attncc.bench.linear_models import delta_by_inverse, gated_by_channel, gated_delta, ssd
from attncc.ir import interpret_linear, parse_linear, print_linear
from attncc.patterns.lift import lift_all
from attncc.patterns.linear import chunks
from attncc.patterns.linear.linear import Recognised

B, N, H, D, E = 2, 21, 3, 6, 5
CHUNK = 8


class Core(nn.Module):
    """Projections' results to a core; what follows is not part of it."""

    def __init__(self, core: Callable[..., tuple[Q, Q]]) -> None:
        super().__init__()
        self.core, self.weight = core, nn.Parameter(torch.randn(E))

    def forward(self, q: Q, k: Q, v: Q, g: Q, beta: Q) -> tuple[Q, Q]:
        out, state = self.core(q.tanh(), k, v, -g.exp(), beta.sigmoid(), CHUNK)
        return out * self.weight, state


def by_channel(q: Q, k: Q, v: Q, g: Q, beta: Q, chunk: int) -> tuple[Q, Q]:
    return gated_by_channel(q, k, v, g[..., None] * torch.linspace(0.1, 1, D), chunk)


def inputs(n: int = N) -> tuple[Q, ...]:
    torch.manual_seed(0)
    return (*(torch.randn(B, n, H, d) for d in (D, D, E)), torch.randn(B, n, H), torch.randn(B, n, H))


@pytest.mark.parametrize("n", [N, pytest.param(3 * CHUNK, marks=pytest.mark.full)])
@pytest.mark.parametrize("core", [gated_delta, delta_by_inverse, ssd, by_channel])
def test_found(core: Callable[..., tuple[Q, Q]], n: int) -> None:
    facts, shadow, given = read(Core(core), *inputs(n))
    (site,) = lift_all(facts)
    assert isinstance(site, Recognised)
    a = parse_linear(print_linear(site.linear))
    assert a == site.linear
    assert a.rule == ("delta" if core in (gated_delta, delta_by_inverse) else "add")
    held = values(shadow, given)
    tensors = {t.name: held[x.name] for t, x in zip(a.tensors, site.tensors, strict=True)}
    got = interpret_linear(a, tensors, compute=torch.float64)
    assert {r.output for r in site.results} == {"out", "state"}
    for r in site.results:
        names = ["b0", "b1", *("ie" if r.output == "out" else "de")]
        want = held[r.node.name].permute([r.axes.index(x) for x in names])
        torch.testing.assert_close(got[r.output], want[..., : got[r.output].shape[-2], :])


def _shifted(q: Q, k: Q, v: Q, g: Q, beta: Q, chunk: int) -> tuple[Q, Q]:
    """Carried states decay a token too little."""
    return ssd(q, k, v, torch.cat([g[:, :1] * 0, g[:, 1:]], 1).roll(1, 1), beta, chunk)


def _forgotten_decay(q: Q, k: Q, v: Q, g: Q, beta: Q, chunk: int) -> tuple[Q, Q]:
    out, state = gated_delta(q, k, v, g, beta, chunk)
    return out, state * 1.01


def _without_a_mask(q: Q, k: Q, v: Q, g: Q, beta: Q, chunk: int) -> tuple[Q, Q]:
    """Inside its chunk a query sees later keys."""
    q, k, v, g = (x.transpose(1, 2)[:, :, : 2 * chunk].unflatten(2, (-1, chunk)) for x in (q, k, v, g))
    total = g.cumsum(-1)
    weights = q @ k.mT * (total[..., :, None] - total[..., None, :]).exp()
    state = (k * (total[..., -1:] - total).exp()[..., None]).mT @ v
    carried = torch.cat([torch.zeros_like(state[:, :, :1]), state[:, :, :1]], 2)
    return weights @ v + (q * total.exp()[..., None]) @ carried, state[:, :, 1]


@pytest.mark.parametrize("core", [_without_a_mask])
def test_not_taken_for_one(core: Callable[..., tuple[Q, Q]]) -> None:
    facts, *_ = read(Core(core), *inputs(3 * CHUNK))
    assert not [x for x in lift_all(facts) if isinstance(x, Recognised) and x.results]


def test_what_is_done_to_the_outputs_stays_outside() -> None:
    facts, *_ = read(Core(_forgotten_decay), *inputs())
    (site,) = lift_all(facts)
    assert isinstance(site, Recognised)
    state = next(r.node for r in site.results if r.output == "state")
    assert [str(u.target) for u in state.users if u in facts.live] == ["aten.mul.Tensor"]


def test_decays_of_other_tokens_are_an_operand() -> None:
    """Whatever makes the decays: they are what the chunks read."""
    facts, *_ = read(Core(_shifted), *inputs())
    (site,) = lift_all(facts)
    assert isinstance(site, Recognised)


def test_equal_layers_are_identified_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = chunks._identified
    monkeypatch.setattr(chunks, "_identified", lambda *given: calls.append(0) or real(*given))

    def twice(q: Q, k: Q, v: Q, g: Q, beta: Q, chunk: int) -> tuple[Q, Q]:
        out, first = gated_delta(q.sin(), k.sin(), v.sin(), g, beta, chunk)
        out, second = gated_delta(q.cos(), k.cos(), out.cos(), g, beta, chunk)
        return out, first.sin() + second

    facts, *_ = read(Core(twice), *inputs())
    found = [x for x in lift_all(facts) if isinstance(x, Recognised)]
    assert (len(found), len(calls)) == (2, 1)


@pytest.mark.parametrize("core", [gated_delta, pytest.param(ssd, marks=pytest.mark.full)])
def test_compiled(core: Callable[..., tuple[Q, Q]]) -> None:
    model, given = Core(core), inputs()
    want = model.double()(*(x.double() for x in given))
    model.float()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="attncc", options={"measure": False})
    with torch.no_grad():
        for x, y in zip(compiled(*given), want, strict=True):
            torch.testing.assert_close(x.double(), y, atol=1e-5, rtol=1e-4)
        report = attncc.explain(model, *given)
    (site,) = report.sites
    assert (site.status, site.language) == ("fused", "cpp")


@pytest.mark.full
def test_compiled_with_gradients() -> None:
    model, given = Core(gated_delta), tuple(x.requires_grad_() for x in inputs())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="attncc", options={"measure": False})
    got = torch.autograd.grad(sum(x.square().sum() for x in compiled(*given)), given)  # type: ignore[arg-type]
    wide = tuple(x.detach().double().requires_grad_() for x in given)
    want = torch.autograd.grad(sum(x.square().sum() for x in model.double()(*wide)), wide)  # type: ignore[arg-type]
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), y, atol=1e-4, rtol=1e-3)
