"""Inductor's patterns of attention: what they match by mistake stays as it is, what they match rightly is fused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from parameters.thinned import thinned
from torch import Tensor, fx
from torch._dynamo.utils import counters

from attncc import torch_private

Form = Callable[[Tensor, Tensor, Tensor], Tensor]
HEADS, FLAT, EVEN = (2, 3, 16, 8), (4, 16, 8), (2, 16, 16, 16)


def over(dim: int) -> Form:
    return lambda q, k, v: (q @ k.mT).div(3.0).softmax(dim) @ v


def products(dim: int) -> Form:
    return lambda q, k, v: torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(dim), v)


def permuted(*order: int) -> Form:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.permute(order) for x in (q, k, v))
        return (q @ k.transpose(-2, -1)).div(3.0).softmax(-1) @ v

    return run


RIGHT: dict[str, tuple[Form, tuple[int, ...]]] = {
    "last axis": (over(-1), HEADS),
    "last axis by its number": (over(3), HEADS),
    "bmm": (products(-1), FLAT),
    "heads behind": (permuted(0, 2, 1, 3), EVEN),
}
WRONG: dict[str, tuple[Form, tuple[int, ...]]] = {
    "queries": (over(-2), HEADS),
    "heads": (over(1), HEADS),
    "bmm over queries": (products(1), FLAT),
    "bmm over the batch": (products(0), FLAT),
    "batch and keys exchanged": (permuted(2, 1, 0, 3), EVEN),
}


def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    return torch_private.inductor(gm, inputs, {"force_disable_caches": True})


def fused(form: Form, shape: tuple[int, ...], grad: bool) -> tuple[int, list[Tensor], list[Tensor]]:
    """How many attentions Inductor fused, and results with gradients: its own, and eager ones."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()
    given = [torch.randn(shape).requires_grad_(grad) for _ in range(3)]

    def results(run: Form) -> list[Tensor]:
        out = run(*given)
        return [out.detach(), *(torch.autograd.grad(out.square().sum(), given) if grad else ())]

    have = results(torch.compile(form, backend=backend))
    return torch_private.fused_by_inductor(), have, results(form)


@pytest.mark.parametrize(("name", "grad"), thinned(list(WRONG), [False, True]))
def test_another_computation_is_left_as_it_is(name: str, grad: bool) -> None:
    count, have, want = fused(*WRONG[name], grad)
    assert count == 0
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", RIGHT)
def test_an_attention_is_fused_as_ever(name: str) -> None:
    count, have, want = fused(*RIGHT[name], False)
    assert count == 1
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)


def test_inductor_alone_is_as_it_was() -> None:
    """Its patterns and its configuration are those that it has without attncc."""
    from torch._inductor import config  # noqa: PLC0415 - as where the patterns are
    from torch._inductor.fx_passes.joint_graph import lazy_init, patterns  # noqa: PLC0415 - they take a second

    lazy_init(torch.device("cpu"))
    before = {at: [(e, e.extra_check) for e in entries] for at, entries in patterns.patterns.items() if entries}
    assert fused(*WRONG["bmm over queries"], False)[0] == 0
    after = {at: [(e, e.extra_check) for e in entries] for at, entries in patterns.patterns.items() if entries}
    assert before and after == before
    assert config.joint_custom_pre_pass is None and config.joint_custom_post_pass is None
