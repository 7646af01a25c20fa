"""The backend end to end on small modules: forms without a softmax, empty rows, gradients, opaque regions."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parameters.thinned import thinned
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attncc
from attncc.driver import backend, rewriting
from attncc.kernels import build
from attncc.report.model import Report

FAST = {"inductor": False, "measure": False}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def both(f: Callable[..., Tensor], *args: Tensor) -> tuple[Report, Tensor, Tensor]:
    report = attncc.explain(f, *args)
    compiled = torch.compile(f, backend="attncc", options=FAST)
    return report, f(*args), compiled(*args)


def operands() -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, 2, 4, 9, 16).unbind(0)
    return q, k, v


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) / 4


CAUSAL = torch.ones(9, 9, dtype=torch.bool).tril()
HIDDEN = torch.zeros(2, 1, 9, 9)
HIDDEN[0, :, 3] = float("-inf")
HIDDEN[1, :, :, 5:] = float("-inf")

FORMS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "sigmoid": (lambda q, k, v: torch.sigmoid(scores(q, k)) @ v, "sigmoid(s / 4.0) v"),
    "squared relu": (lambda q, k, v: torch.relu(scores(q, k)) ** 2 @ v, ""),
    "masked sigmoid": (lambda q, k, v: torch.sigmoid(scores(q, k)).masked_fill(~CAUSAL, 0.0) @ v, ""),
    "float mask": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=HIDDEN), ""),
    "additive": (lambda q, k, v: (scores(q, k) + HIDDEN).softmax(-1) @ v, ""),
    "bool mask": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=HIDDEN == 0), ""),
    "finite fill": (lambda q, k, v: scores(q, k).masked_fill(HIDDEN != 0, -1e9).softmax(-1) @ v, ""),
    "infinite fill": (lambda q, k, v: scores(q, k).masked_fill(HIDDEN != 0, float("-inf")).softmax(-1) @ v, ""),
    "guarded": (
        lambda q, k, v: scores(q, k).masked_fill(HIDDEN != 0, float("-inf")).softmax(-1).nan_to_num(0.0) @ v, ""),
    "einsum": (lambda q, k, v: torch.einsum("bhij,bhjd->bihd", scores(q, k).softmax(-1), v), ""),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_forms_agree_with_eager(name: str) -> None:
    form, equation = FORMS[name]
    report, eager, ours = both(form, *operands())
    assert len(report.sites) == 1 and report.sites[0].status != "refused"
    assert not equation or report.sites[0].equation == equation
    torch.testing.assert_close(ours, eager, rtol=1e-5, atol=2e-6, equal_nan=True)


class Jagged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        x = torch.nested.nested_tensor_from_jagged(rows, offsets)
        q, k, v = (f(x).unflatten(-1, [4, 8]).transpose(1, 2) for f in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2).values()


def test_nested_tensors_keep_the_graph_and_are_reported() -> None:
    torch.manual_seed(0)
    model, rows, offsets = Jagged(), torch.randn(19, 32), torch.tensor([0, 7, 19])
    report = attncc.explain(model, rows, offsets)
    assert not report.sites
    assert any("nested tensors" in note for note in report.notes), report.notes
    assert not any("could not be read" in note for note in report.notes), report.notes
    torch._dynamo.reset()
    eager, compiled = model(rows, offsets), torch.compile(model, backend="attncc")(rows, offsets)
    torch.testing.assert_close(compiled, eager)
    parameters = list(model.parameters())
    for want, got in zip(*(torch.autograd.grad(x.square().sum(), parameters) for x in (eager, compiled)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_scores_that_are_needed_elsewhere_keep_the_graph() -> None:
    def strongest(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = scores(q, k).softmax(-1)
        return weights @ v + weights.amax(-2)[..., None]

    report, eager, ours = both(strongest, *operands())
    assert "kept" in [s.status for s in report.sites] and not report.fused
    assert any("elsewhere" in s.reason for s in report.sites)
    torch.testing.assert_close(ours, eager)


def test_products_of_products_are_no_site() -> None:
    report, _, _ = both(lambda q, k, v: q @ k.transpose(-1, -2) @ v, *operands())
    assert report.sites == ()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return (q @ k.transpose(-1, -2) / 32**0.5).softmax(-1) @ v

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x)


class Checkpointed(Block):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.attend, x, use_reentrant=False)


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 5  # not the true gradient, so that losing it shows


class OwnGradient(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.attend(Scaled.apply(x))


class Weighed(torch.autograd.Function):
    """Attention with a backward of its own, which has other arguments than the forward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return (q @ k.mT / 32**0.5).softmax(-1) @ v

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ctx.saved_tensors
        weights = (q @ k.mT / 32**0.5).softmax(-1)
        inner = weights * (g @ v.mT - (g @ v.mT * weights).sum(-1, keepdim=True)) * 32**-0.5
        return inner @ k * 3, inner.mT @ q, weights.mT @ g


class OwnAttention(Block):
    def attend(self, x: Tensor) -> Tensor:
        return Weighed.apply(*self.qkv(x).chunk(3, -1))


@pytest.mark.parametrize(("kind", "dynamic"), thinned([Block, Checkpointed, OwnGradient, OwnAttention], [False, True]))
def test_gradients_survive(kind: type[Block], dynamic: bool) -> None:
    model, x = kind(), torch.randn(2, 16, 32, requires_grad=True)
    compiled = torch.compile(model, backend="attncc", dynamic=dynamic, options={"measure": False})
    found = backend.Collected()
    token = backend.collecting.set(found)
    try:
        eager, ours = model(x), compiled(x)
    finally:
        backend.collecting.reset(token)
    assert [s.status for s in found.sites] in (["fused"], ["kept"]) and not found.notes
    g = torch.randn_like(eager)
    (want,) = torch.autograd.grad(eager, x, g)
    (have,) = torch.autograd.grad(ours, x, g)
    torch.testing.assert_close(ours, eager)
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)


def weighed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def batched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.vmap(weighed)(q, k, v)


def derived(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.func.grad(lambda q: weighed(q, k, v).square().sum())(q)


@pytest.mark.parametrize(("f", "name"), [(batched, "torch.func.vmap"), (derived, "torch.func.grad")])
def test_transforms_are_said(f: Callable[..., Tensor], name: str) -> None:
    report, eager, ours = both(f, *operands())
    (site,) = report.sites  # some versions of torch show a trace what is inside
    assert site.status == "fused" or name in site.reason
    torch.testing.assert_close(ours, eager)


def test_autocast_reads_what_the_model_reads() -> None:
    model, x = Block().eval(), torch.randn(2, 16, 32)

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x)

    report, eager, ours = both(run, x)
    assert len(report.sites) == 1 and ours.dtype == eager.dtype == torch.bfloat16
    exact = model.double()(x.double())
    assert (ours.double() - exact).abs().max() <= 2 * (eager.double() - exact).abs().max() + 1e-3


def test_a_length_that_changes_before_the_attention_is_read_before() -> None:
    class Counting(Block):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("length", torch.tensor(5))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            visible = torch.arange(x.shape[1]) < self.length
            self.length.add_(3)
            return (q @ k.transpose(-1, -2)).masked_fill(~visible, float("-inf")).softmax(-1) @ v

    model, x = Counting().eval(), torch.randn(2, 16, 32)
    compiled = torch.compile(model, backend="attncc", options=FAST)
    with torch.no_grad():
        have = [compiled(x) for _ in range(3)]
        model.length.fill_(5)
        want = [model(x) for _ in range(3)]
    for h, w in zip(have, want, strict=True):
        torch.testing.assert_close(h, w, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("lenient")
def test_a_failing_edit_leaves_the_graph_as_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("on purpose")

    monkeypatch.setattr(rewriting.Editor, "finish", broken)
    model, x = Block().eval(), torch.randn(2, 16, 32)
    report = attncc.explain(model, x)
    assert [s.status for s in report.sites] == ["kept"] and "on purpose" in report.sites[0].reason
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(torch.compile(model, backend="attncc", options=FAST)(x), model(x))


def test_no_compiler_is_said_and_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_toolchain", lambda: None)
    report, eager, ours = both(Block().eval(), torch.randn(2, 16, 32))
    assert [s.status for s in report.sites] == ["kept"] and "compiler" in report.sites[0].reason
    torch.testing.assert_close(ours, eager)


def test_the_mask_leaves_the_compiled_graph() -> None:
    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hidden = torch.ones(9, 9, dtype=torch.bool).triu(1)
        return scores(q, k).masked_fill(hidden, float("-inf")).softmax(-1) @ v

    compiled: list[str] = []

    def keep(gm: Any, inputs: Any) -> Any:
        found = backend.Collected()
        compiled.extend(str(n.target) for n in backend.rewrite(gm, inputs, found, measure=False).graph.nodes)
        return gm

    torch.compile(causal, backend=keep)(*operands())
    assert "attncc.attention.default" in compiled
    gone = ("triu", "ones", "masked_fill", "softmax", "matmul")
    assert not [target for target in compiled if any(word in target for word in gone)]
