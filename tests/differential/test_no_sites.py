"""What weighs or compares and is no attention, and who else needs the scores of one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from reading.lifting import Q, read
from reading.reason_model import WIDTH, B, Model, N

from attncc.driver.site_groups import together
from attncc.patterns.lift import lift_all
from attncc.patterns.refusals.reasons import used_by
from attncc.patterns.site.assemble import Lifted


def pooled_product(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    """A factorisation machine's terms, and a gate of what two tensors have in common."""
    return x * m.lin((m.lin(x) * x).sum(1, keepdim=True)) + (m.lin(x) * x).sum(-1, keepdim=True)


def contrastive(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    logits = q.flatten(0, 2) @ k.flatten(0, 2).T
    return F.cross_entropy(logits, torch.arange(logits.shape[0]))


def adapter(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    return x + x @ m.lin.weight[:4].T @ m.lin.weight[4:8]


def masked_mean(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    seen = (x > 0.2).to(x.dtype)
    return x - (x * seen).sum(1, keepdim=True) / seen.sum(1, keepdim=True).clamp_min(1.0)


def chosen_layers(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    """Experts as matrices that are picked by number, after what compares tokens."""
    numbers = m.gate(x).argmax(-1).flatten()
    near = torch.tanh((x @ x.mT).amax(-1, keepdim=True))
    hidden = F.silu(torch.bmm(m.up[numbers], (x * near).flatten(0, 1)[..., None]))
    return torch.bmm(m.down[numbers], hidden).view_as(x)


SILENT = [chosen_layers, masked_mean, contrastive, adapter, pooled_product]


@pytest.mark.parametrize("core", SILENT)
def test_nothing_to_say(core: Callable[..., Q]) -> None:
    facts, *_ = read(Model(core).eval(), torch.randn(B, N, WIDTH))
    assert lift_all(facts) == []


def stick_breaking(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    """Tan et al., 2024: arXiv 2410.17980."""
    scores, before = q @ k.mT, torch.ones(N, N, dtype=torch.bool).tril(-1)
    left = F.logsigmoid(-scores).masked_fill(~before, 0)
    rest = left.flip(-1).cumsum(-1).flip(-1) - left
    return (F.logsigmoid(scores) + rest).masked_fill(~before, -torch.inf).exp() @ v


def sparsemax(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    """Martins and Astudillo, 2016: arXiv 1602.02068."""
    scores = q @ k.mT
    ordered = (scores * 1.0).sort(-1, descending=True).values
    over = ordered.cumsum(-1) - 1
    count = (ordered * torch.arange(1, N + 1) > over).sum(-1, keepdim=True)
    return (scores - over.gather(-1, count - 1) / count).relu() @ v


def drawn(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    return F.gumbel_softmax(q @ k.mT, dim=-1) @ v


def dropped_by_hand(m: Model, x: Q, q: Q, k: Q, v: Q) -> Q:
    weights = (q @ k.mT).softmax(-1)
    return weights * (torch.rand_like(weights) > 0.1) @ v


USERS = [(stick_breaking, "cumsum"), (sparsemax, "sort"), (drawn, "exponential"), (dropped_by_hand, "rand_like")]


@pytest.mark.parametrize(("core", "name"), USERS)
def test_who_needs_the_scores(core: Callable[..., Q], name: str) -> None:
    facts, *_ = read(Model(core).eval(), torch.randn(B, N, WIDTH))
    (joint,) = together([site for site in lift_all(facts) if isinstance(site, Lifted)], facts)
    assert joint.user is not None
    assert used_by(facts, joint.user) == name
