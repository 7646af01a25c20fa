"""Policies in a model that is compiled: what they select is computed in its graph, by Inductor, of any length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from memory.allocations import allocations
from parameters.thinned import thinned
from policies.sequences import exactly
from policies.situations import Situation, kept, masked
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from attncc.driver import rewriting
from attncc.ir import interpret_program
from attncc.ir.program import program_of_node
from attncc.passes.pipeline import Pipeline, standard
from attncc.passes.policies import (
    Antidiagonal,
    BlockMeans,
    ChunkMeans,
    FlexPrefill,
    Pages,
    PooledRest,
    Rectified,
    SelfSimilar,
    VerticalSlash,
)
from attncc.passes.policies.hiding import Composed, Policy


class Model(nn.Module):
    """Grouped heads under a causal mask, and the mask of padding in front where it is given."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
        n, m = q.shape[-2], k.shape[-2]
        mask = torch.arange(m, device=q.device) <= torch.arange(n, device=q.device)[:, None] + (m - n)
        if seen is not None:
            mask = mask & seen[:, None, None, :]
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.25, enable_gqa=True)


@contextmanager
def under(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, the programs of all sites go through a policy first."""

    def with_policy(*factors: object) -> Pipeline:
        return Pipeline((policy, *standard(*factors).passes))  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(rewriting, "standard", with_policy)
        rewriting._run_passes.cache_clear()  # type: ignore[reportPrivateUsage]
        torch.compiler.reset()
        yield
    rewriting._run_passes.cache_clear()  # type: ignore[reportPrivateUsage]
    torch.compiler.reset()


def compiled(*, dynamic: bool = False, inductor: bool = True) -> Callable[..., Tensor]:
    """`dynamic`: in the numbers of rows and of keys."""
    options: dict[str, str | int | bool | Callable[..., object]] = {"measure": False, "inductor": inductor}
    run = torch.compile(Model(), backend="attncc", options=options, dynamic=None if dynamic else False)

    def call(*tensors: Tensor) -> Tensor:
        for x in tensors if dynamic else ():
            torch._dynamo.mark_dynamic(x, x.dim() - 2 if x.dim() == 4 else 1)
        return run(*tensors)

    return call


def wanted(policy: Policy, s: Situation, data: dict[str, Tensor]) -> Tensor:
    p = policy(program_of_node(s.attention()))  # type: ignore[operator]
    if isinstance(policy, Composed):
        return interpret_program(p, exactly(data), s.sizes, compute=torch.float64)[p.outputs[0]]
    return masked(data, s, kept(p, data, s))


def check(policy: Policy, run: Callable[..., Tensor], s: Situation) -> None:
    data = s.tensors()
    out = run(*data.values())
    assert_close(out.double(), wanted(policy, s, data), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("policy", "mask"),
    thinned([FlexPrefill(4, 0.5, 0.3, 8), BlockMeans(8, 4, "mass", 0.6)], ["causal", "padded"]),
    ids=lambda x: getattr(x, "name", x),
)
def test_one_graph_of_any_length(policy: Policy, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with under(policy, monkeypatch):
        run = compiled(dynamic=True)
        for n, m in ((37, 37), (21, 45), (40, 40)):
            check(policy, run, Situation(mask, group=2, n=n, m=m))


@pytest.mark.parametrize(
    ("policy", "s"),
    [
        (Pages(4, 12), Situation("padded", group=2, n=1, m=40, dynamic=False)),
        *(
            pytest.param(policy, s, marks=pytest.mark.full)
            for policy, s in (
                (Antidiagonal(8, 4, amount=0.6), Situation("padded", group=2, dynamic=False)),
                (SelfSimilar(8, 4, amount=0.6, similar=0.3), Situation("padded", group=2, dynamic=False)),
                (Rectified(8, 0.3, 0.6), Situation("padded", group=2, dynamic=False)),
                (ChunkMeans(4, 8, 5, 3, 2), Situation("causal", group=4, dynamic=False)),
                (VerticalSlash(4, 6, 8, 4, 2, 3), Situation("padded", group=2, n=16, m=33, dynamic=False)),
            )
        ),
    ],
    ids=lambda x: getattr(x, "name", "") or x.mask,
)
def test_known_lengths(policy: Policy, s: Situation, monkeypatch: pytest.MonkeyPatch) -> None:
    with under(policy, monkeypatch):
        check(policy, compiled(), s)


def test_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is selected has no gradient: those of the model are those of the masked attention."""
    policy, s = BlockMeans(8, 4, "mass", 0.6), Situation("padded", group=2, dynamic=False)
    data = s.tensors()
    exact = {x: data[x].double().requires_grad_() for x in "qkv"}
    mask = kept(policy(program_of_node(s.attention())), data, s)
    q, k, v = exact.values()
    scores = (q @ k.repeat_interleave(2, 1).mT * 0.25).masked_fill(~mask, -1e30)
    out = torch.where(mask, scores.softmax(-1), 0.0) @ v.repeat_interleave(2, 1)
    reference = torch.autograd.grad(out.square().sum(), list(exact.values()))
    with under(policy, monkeypatch):
        given = {x: data[x].clone().requires_grad_() for x in "qkv"}
        found = compiled()(*given.values(), data["seen"])
        grads = torch.autograd.grad(found.square().sum(), list(given.values()))
    for x, y in zip(grads, reference, strict=True):
        assert_close(x.double(), y, rtol=1e-3, atol=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("inductor", [False, True])
def test_two_attentions_in_one_graph_of_any_length(monkeypatch: pytest.MonkeyPatch, inductor: bool) -> None:
    policy = PooledRest(8, 4, "fraction", 0.3)
    with under(policy, monkeypatch), torch.no_grad():
        run = compiled(dynamic=True, inductor=inductor)
        for n, m in ((37, 37), (21, 45), (40, 40)):
            check(policy, run, Situation("padded", group=2, n=n, m=m))


def test_gradients_of_two_attentions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The means pass theirs on to all keys and values of their blocks."""
    policy, s = PooledRest(8, 4, "fraction", 0.3), Situation("padded", group=2, dynamic=False)
    data = s.tensors()
    exact = {x: data[x].double().requires_grad_() for x in "qkv"}
    out = wanted(policy, s, data | exact)
    reference = torch.autograd.grad(out.square().sum(), list(exact.values()))
    with under(policy, monkeypatch):
        given = {x: data[x].clone().requires_grad_() for x in "qkv"}
        found = compiled(inductor=False)(*given.values(), data["seen"])
        grads = torch.autograd.grad(found.square().sum(), list(given.values()))
    for x, y in zip(grads, reference, strict=True):
        assert_close(x.double(), y, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "policy",
    [
        BlockMeans(),
        *(
            pytest.param(x, marks=pytest.mark.full)
            for x in (Antidiagonal(64, 16), VerticalSlash(64, 256), PooledRest())
        ),
    ],
    ids=lambda p: p.name,
)
def test_no_square_is_made(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    n = 2048
    s = Situation("padded", heads=2, group=2, n=n, m=n, dynamic=False)
    data = s.tensors()
    with under(policy, monkeypatch), torch.no_grad():
        run = compiled()
        run(*data.values())
        made = allocations(lambda: run(*data.values()))
    assert max(made) < n * n, "bytes of the largest block: a mask of one head has so many"
