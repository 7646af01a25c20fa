"""Gradients that the model stops stay stopped, wherever it stops them: eager in float64 is the oracle."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from gradients.compared import compared, inputs
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

Q = torch.Tensor
B, H, N, D = 2, 2, 6, 4


def attend(scores: Q, v: Q) -> Q:
    return scores.softmax(-1) @ v


def off(f: Callable[[], Q]) -> Q:
    with torch.no_grad():
        return f()


def inferred(f: Callable[[], Q]) -> Q:
    with torch.inference_mode():
        x = f()
    return x.clone()


def switched(f: Callable[[], Q]) -> Q:
    torch.set_grad_enabled(False)
    x = f()
    torch.set_grad_enabled(True)
    return x


@torch.no_grad()
def halved(x: Q) -> Q:
    return x * 0.5


def partly(x: Q) -> Q:
    """Straight through a clamp."""
    return x + (x.clamp(-1, 1) - x).detach()


def in_place(x: Q, by: Q) -> Q:
    x = x.clone()
    x.mul_(by)
    return x


def late(x: Q) -> Q:
    return x.clone().detach_()


def quotient(x: Q, v: Q, stopped: str) -> Q:
    e = (x - x.amax(-1, keepdim=True).detach()).exp()
    total = e.sum(-1, keepdim=True)
    top = e.detach() if stopped == "top" else e
    if stopped == "off":
        total = off(lambda: e.sum(-1, keepdim=True))
    return (top / (total.detach() if stopped == "bottom" else total)) @ v


#: Arguments are queries, keys and values (B, H, N, D), a scale (H, 1, 1) and a bias (H, N, N), all with gradients.
MODELS: dict[str, Callable[[Q, Q, Q, Q, Q], Q]] = {
    "scale": lambda q, k, v, s, b: attend(q @ k.mT * s.detach(), v),
    "scale by data": lambda q, k, v, s, b: attend(q @ k.mT * s.data + b, v),
    "scale in a region": lambda q, k, v, s, b: attend(q @ k.mT * off(lambda: s.exp() + 1) + b, v),
    "scale in a decorated function": lambda q, k, v, s, b: attend(q @ k.mT * halved(s) + b * s, v),
    "scale in inference mode": lambda q, k, v, s, b: attend(q @ k.mT * inferred(lambda: s * 2), v),
    "scale with gradients switched off": lambda q, k, v, s, b: attend(q @ k.mT * switched(lambda: s * 2), v),
    "scale stopped and not": lambda q, k, v, s, b: attend(q @ k.mT * s.detach() + s * b, v),
    "scale through views": lambda q, k, v, s, b: attend(q @ k.mT * s.detach().expand(H, N, N).transpose(0, 0), v),
    "scale late": lambda q, k, v, s, b: attend(q @ k.mT * late(s), v),
    "product": lambda q, k, v, s, b: attend((q @ k.mT).detach() * s + b, v),
    "product by data": lambda q, k, v, s, b: attend((q @ k.mT).data * s + b, v),
    "product in a region": lambda q, k, v, s, b: attend(off(lambda: q @ k.mT) * s + b, v),
    "product and mask in a region": lambda q, k, v, s, b: attend(
        off(lambda: (q @ k.mT).masked_fill(torch.ones(N, N).triu(1).bool(), -torch.inf)) + b, v),
    "product einsum in a region": lambda q, k, v, s, b: attend(
        off(lambda: torch.einsum("bhid,bhjd->bhij", q, k)) + b, v),
    "bias": lambda q, k, v, s, b: attend(q @ k.mT * s + b.detach(), v),
    "bias under softplus in a region": lambda q, k, v, s, b: attend(q @ k.mT * s + off(lambda: F.softplus(b) * s), v),
    "scores": lambda q, k, v, s, b: attend((q @ k.mT * s + b).detach(), v * s),
    "weights": lambda q, k, v, s, b: (q @ k.mT * s).softmax(-1).detach() @ v,
    "weights by data": lambda q, k, v, s, b: (q @ k.mT * s).softmax(-1).data @ v,
    "weights in a region": lambda q, k, v, s, b: off(lambda: (q @ k.mT * s).softmax(-1)) @ (v * s),
    "weights times a scale": lambda q, k, v, s, b: ((q @ k.mT + b).softmax(-1).detach() * s) @ v,
    "weights guarded": lambda q, k, v, s, b: (q @ k.mT + b).softmax(-1).detach().nan_to_num(0.0) @ (v * s),
    "scale of weights": lambda q, k, v, s, b: ((q @ k.mT + b).softmax(-1) * s.detach()) @ v,
    "softmax in a region": lambda q, k, v, s, b: off(lambda: (q @ k.mT + b).softmax(-1)) * s @ v,
    "all in a region": lambda q, k, v, s, b: off(lambda: attend(q @ k.mT * s + b, v)) + v * s,
    "queries": lambda q, k, v, s, b: attend(q.detach() @ k.mT * s + b, v),
    "keys repeated": lambda q, k, v, s, b: attend(q @ k[:, :1].repeat_interleave(H, 1).detach().mT + b, v),
    "keys repeated in a region": lambda q, k, v, s, b: attend(
        q @ off(lambda: k[:, :1].expand(B, H, N, D).contiguous()).mT + b, v),
    "keys made in a region": lambda q, k, v, s, b: attend(q @ off(lambda: k * s).mT + b, v),
    "values": lambda q, k, v, s, b: attend(q @ k.mT * s + b, v.detach()),
    "values and weights": lambda q, k, v, s, b: attend((q @ k.mT * s).detach() + b, v.detach()),
    "shared by all": lambda q, k, v, s, b: attend((q @ q.mT).detach() * s, q),
    "values also queries": lambda q, k, v, s, b: attend(q @ k.mT * s, q.detach()),
    "straight-through scores": lambda q, k, v, s, b: attend(partly(q @ k.mT * s), v),
    "straight-through weights": lambda q, k, v, s, b: _soft_and_hard(q @ k.mT * s, v),
    "half of the scores": lambda q, k, v, s, b: attend((q @ k.mT) * 0.5 + (q @ k.mT).detach() * 0.5 + b, v),
    "scores and their stopped copy": lambda q, k, v, s, b: _both(q @ k.mT, s, b, v),
    "maximum": lambda q, k, v, s, b: attend(_less(q @ k.mT * s + b), v),
    "maximum of values in a region": lambda q, k, v, s, b: attend(_less_off(q @ k.mT * s + b), v),
    "bias stopped in part": lambda q, k, v, s, b: attend(
        q @ k.mT + torch.cat([b[..., :3].detach(), b[..., 3:]], -1), v),
    "written in place": lambda q, k, v, s, b: attend(in_place(q @ k.mT, s.detach()) + b, v),
    "written into what was stopped": lambda q, k, v, s, b: attend(in_place((q @ k.mT).detach(), s) + b, v),
    "copied into": lambda q, k, v, s, b: attend(torch.zeros_like(b).copy_(b.detach() * s) + q @ k.mT, v),
    "quotient": lambda q, k, v, s, b: quotient(q @ k.mT * s, v, ""),
    "quotient by a stopped sum": lambda q, k, v, s, b: quotient(q @ k.mT * s, v, "bottom"),
    "quotient by a sum in a region": lambda q, k, v, s, b: quotient(q @ k.mT * s, v, "off"),
    "quotient of stopped exponentials": lambda q, k, v, s, b: quotient(q @ k.mT * s, v, "top"),
    "divided late": lambda q, k, v, s, b: _late(q @ k.mT * s, v, stopped=False),
    "divided late by a stopped sum": lambda q, k, v, s, b: _late(q @ k.mT * s, v, stopped=True),
    "less a stopped sum": lambda q, k, v, s, b: _log_sum(q @ k.mT * s + b, v),
    "sigmoid": lambda q, k, v, s, b: (q @ k.mT * s.detach() + b).sigmoid() @ v,
    "sigmoid of stopped scores": lambda q, k, v, s, b: ((q @ k.mT).detach() * s + b).sigmoid() @ v,
    "stopped sigmoid": lambda q, k, v, s, b: (q @ k.mT * s).sigmoid().detach() @ v,
    "sigmoid stopped in part": lambda q, k, v, s, b: (partly(q @ k.mT * s) + b).sigmoid() @ v,
    "written out": lambda q, k, v, s, b: attend((q.detach()[:, :, :, None] * k[:, :, None]).sum(-1) * s + b, v),
    "written out in a region": lambda q, k, v, s, b: attend(
        off(lambda: (q[:, :, :, None] * k[:, :, None]).sum(-1)) * s + b, v),
    "written out, one side in a region": lambda q, k, v, s, b: attend(
        (off(lambda: q[:, :, :, None] * 2) * k[:, :, None]).sum(-1) * s + b, v),
    "written out, product stopped": lambda q, k, v, s, b: attend(
        (q[:, :, :, None] * k[:, :, None]).detach().sum(-1) * s + b, v),
    "distances": lambda q, k, v, s, b: attend(-torch.cdist(q.detach(), k).square() * s + b, v),
    "stopped distances": lambda q, k, v, s, b: attend(-torch.cdist(q, k).square().detach() * s + b, v),
    "heads mixed by a stopped matrix": lambda q, k, v, s, b: attend(
        torch.einsum("hg,bgij->bhij", b[:, :H, 0].detach(), q @ k.mT) + b, v),
    "stopped heads mixed": lambda q, k, v, s, b: attend(
        torch.einsum("hg,bgij->bhij", s[:, 0] + s[:, 0].mT, (q @ k.mT).detach()) + b, v),
    "heads mixed by a matrix of a region": lambda q, k, v, s, b: attend(
        torch.einsum("hg,bgij->bhij", off(lambda: s[:, 0] + s[:, 0].mT), q @ k.mT) + b, v),
    "cosines beside a region": lambda q, k, v, s, b: attend(
        F.cosine_similarity(q[:, :, :, None], off(lambda: k * 2)[:, :, None], -1) * s + b, v),
    "weights of heads mixed, stopped": lambda q, k, v, s, b: torch.einsum(
        "hg,bgij->bhij", b[:, :H, 0], (q @ k.mT).softmax(-1).detach()) @ v,
    "two softmaxes, one stopped": lambda q, k, v, s, b: (
        (q @ k.mT).softmax(-1).detach() - s * (k @ q.mT).softmax(-1)) @ v,
    "sdpa": lambda q, k, v, s, b: F.scaled_dot_product_attention(q, k.detach(), v * s),
    "sdpa with a stopped bias": lambda q, k, v, s, b: F.scaled_dot_product_attention(q, k, v, b.detach() * s),
    "sdpa with a bias made in a region": lambda q, k, v, s, b: F.scaled_dot_product_attention(
        q, k, v, off(lambda: b * 2) + s),
    "sdpa in a region": lambda q, k, v, s, b: off(lambda: F.scaled_dot_product_attention(q, k, v)) * s,
}  # fmt: skip


def _soft_and_hard(scores: Q, v: Q) -> Q:
    soft = scores.softmax(-1)
    hard = (soft == soft.amax(-1, keepdim=True)).to(soft.dtype)
    return (hard - soft.detach() + soft) @ v


def _both(x: Q, s: Q, b: Q, v: Q) -> Q:
    return attend(x * s + x.detach() * b, v)


def _less(x: Q) -> Q:
    return x - x.amax(-1, keepdim=True).detach()


def _less_off(x: Q) -> Q:
    with torch.no_grad():
        most = x.max(-1, keepdim=True).values
    return x - most


def _late(x: Q, v: Q, *, stopped: bool) -> Q:
    e = (x - x.amax(-1, keepdim=True).detach()).exp()
    total = e.sum(-1, keepdim=True)
    return (e @ v) / (total.detach() if stopped else total)


def _log_sum(x: Q, v: Q) -> Q:
    return (x - x.logsumexp(-1, keepdim=True).detach()).exp() @ v


def arguments(*, grad: bool = True) -> list[Q]:
    return inputs((B, H, N, D), (B, H, N, D), (B, H, N, D), (H, 1, 1), (H, N, N), grad=grad)


#: What is left to the model, and why: everything else is fused.
KEPT = {
    "straight-through weights", "quotient by a stopped sum", "quotient by a sum in a region",
    "quotient of stopped exponentials", "divided late by a stopped sum", "less a stopped sum",
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_model(name: str) -> None:
    with sdpa_kernel(SDPBackend.MATH):
        found = compared(MODELS[name], *arguments())
    print(name, found.gradients, [(s.status, s.reason) for s in found.sites])
    assert found.worst < 1e-9
    assert ("fused" in found.statuses) == (name not in KEPT)


@pytest.mark.parametrize("name", MODELS)
def test_without_gradients_nothing_is_stopped(name: str) -> None:
    with sdpa_kernel(SDPBackend.MATH):
        found = compared(MODELS[name], *arguments(grad=False))
    assert found.worst < 1e-9
    assert not any("stop(" in (s.ir or "") or "first(" in (s.ir or "") for s in found.sites)


def _behind(x: Q, how: str) -> Q:
    """`x`, changed where autograd does not see it."""
    if how == "detached":
        x.detach().mul_(2.0)
    elif how == "data":
        x.data.mul_(2.0)
    elif how == "mask":
        x.data.masked_fill_(torch.ones(N, N).triu(1).bool(), -torch.inf)
    elif how == "region":
        with torch.no_grad():
            x.mul_(2.0)
    elif how == "view in a region":
        with torch.no_grad():
            x[..., 3:].mul_(2.0)
    return x


@pytest.mark.parametrize("how", ("detached", "data", "mask", "region", "view in a region"))
def test_writes_that_autograd_does_not_see(how: str) -> None:
    found = compared(lambda q, k, v, s, b: attend(_behind(q @ k.mT, how) * s, v), *arguments())
    assert found.worst < 1e-9
    assert [s.reason for s in found.sites] == ["a tensor that the model writes to where autograd does not see it"]
    found = compared(lambda q, k, v, s, b: attend(_behind(q @ k.mT, how) * s, v), *arguments(grad=False))
    assert found.worst < 1e-9
    assert found.statuses == ["fused"]


@pytest.mark.parametrize("stopped", ("block", "product", "nothing"))
def test_results_of_a_block_that_is_computed_again(stopped: str) -> None:
    """What a higher-order operator gives is followed like an input."""

    def model(q: Q, k: Q, v: Q, s: Q, b: Q) -> Q:
        h = checkpoint(lambda x, y: x * y.sin(), q, k, use_reentrant=False)
        h = h.detach() if stopped == "block" else h
        scores = h @ k.mT
        return attend((scores.detach() if stopped == "product" else scores) * s + b, v)

    found = compared(model, *arguments())
    assert found.worst < 1e-9
    assert found.statuses == ["fused"]


def test_stops_inside_a_block_that_is_computed_again() -> None:
    def block(q: Q, k: Q, v: Q, s: Q) -> Q:
        return attend((q @ k.mT).detach() * s + q @ k.mT, v)

    found = compared(lambda q, k, v, s, b: checkpoint(block, q, k, v, s, use_reentrant=False), *arguments())
    assert found.worst < 1e-9
    assert found.statuses == ["fused"]


@pytest.mark.parametrize("stopped", ("score", "bias", "nothing"))
def test_flex_attention(stopped: str) -> None:
    """On a CPU, gradients flow into what a score function captures alone; the model written out is the oracle."""

    def model(q: Q, k: Q, v: Q, s: Q, b: Q) -> Q:
        def score_mod(x: Q, batch: Q, h: Q, i: Q, j: Q) -> Q:
            y = x * s[h, 0, 0]
            y = y.detach() if stopped == "score" else y
            return y * s[h, 0, 0] + (b.detach() if stopped == "bias" else b)[h, i, j]

        return flex_attention(q, k, v, score_mod, scale=1.0)

    def oracle(q: Q, k: Q, v: Q, s: Q, b: Q) -> Q:
        y = q @ k.mT * s
        y = y.detach() if stopped == "score" else y
        return attend(y * s + (b.detach() if stopped == "bias" else b), v)

    given = [x.float().detach().requires_grad_(n > 2) for n, x in enumerate(arguments())]
    found = compared(model, *given, oracle=oracle)
    assert found.worst < 1e-5
    assert found.statuses == ["fused"]


def test_a_stop_that_is_not_read_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever reads over a stop: a site that passes gradients on that the model stops is left alone."""
    monkeypatch.setattr("attncc.patterns.reader.value.without_stopped", lambda r, g, n, value, at, when: value)
    for name in ("product", "weights", "scale", "stopped sigmoid"):
        found = compared(MODELS[name], *arguments())
        assert found.worst < 1e-9
        assert "not read" in found.sites[0].reason


def test_a_tensor_without_gradients_gets_none() -> None:
    """Not zeros: an optimiser treats the two differently. A mask, too, passes no gradient on."""

    def model(q: Q, k: Q, v: Q, s: Q, b: Q) -> Q:
        return attend((q @ k.mT * s.detach()).masked_fill((b > 0.5) & ~torch.eye(N).bool(), -torch.inf), v)

    found = compared(model, *arguments())
    assert found.worst < 1e-9
    assert found.statuses == ["fused"]
