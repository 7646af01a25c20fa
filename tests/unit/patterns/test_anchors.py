"""Where a softmax is: each row of the table, the ways in which its parts are written, and what looks like them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from reading.asked import Asked
from reading.lifted import differences, found
from torch import nn

from attncc.patterns.softmax.anchors import _LOGS, _SOFTMAXES, Anchor, normalisers

Q = torch.Tensor
aten = torch.ops.aten
ROWS, KEYS = 5, 7


class Model(nn.Module):
    """Weights of the scores of three tensors, times the last."""

    def __init__(self, weights: Callable[[Q], Q]) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, q: Q, k: Q, v: Q) -> Q:
        return self.weights(q @ k.mT) @ v


def inputs() -> tuple[Q, Q, Q]:
    by = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, n, 4, generator=by) for n in (ROWS, KEYS, KEYS))  # type: ignore[return-value]


SPELLINGS: dict[object, Callable[[Q], Q]] = {
    aten.softmax.int: lambda s: aten.softmax.int(s, -1),
    aten._softmax.default: lambda s: aten._softmax(s, 2, False),
    aten._safe_softmax.default: lambda s: aten._safe_softmax(s, -1),
    aten.special_softmax.default: lambda s: aten.special_softmax(s, -1),
    aten.div.Tensor: lambda s: s.exp() / s.exp().sum(-1, keepdim=True),
    aten.div_.Tensor: lambda s: s.exp().div_(s.exp().sum(-1, keepdim=True)),
    aten.exp.default: lambda s: (s - s.logsumexp(-1, keepdim=True)).exp(),
    aten.exp_.default: lambda s: (s - s.logsumexp(-1, keepdim=True)).exp_(),
    aten.logsumexp.default: lambda s: (s - aten.logsumexp(s, [-1]).unsqueeze(-1)).exp(),
    aten.special_logsumexp.default: lambda s: (s - aten.special_logsumexp(s, [-1], True)).exp(),
    aten.log_softmax.int: lambda s: aten.log_softmax(s, -1).exp(),
    aten._log_softmax.default: lambda s: aten._log_softmax(s, -1, False).exp(),
    aten.special_log_softmax.default: lambda s: aten.special_log_softmax(s, -1).exp(),
}
OTHERS: dict[str, Callable[[Q], Q]] = {
    "less its maximum": lambda s: _less_maximum(s, s.amax(-1, keepdim=True)),
    "less its maximum, in one of two results": lambda s: _less_maximum(s, s.max(-1, keepdim=True)[0]),
    "less a maximum without gradient": lambda s: _less_maximum(s, s.amax(-1).unsqueeze(-1).detach()),
    "powers of two": lambda s: s.exp2() / s.exp2().sum(-1, keepdim=True),
    "powers of three": lambda s: 3.0**s / (3.0**s).sum(-1).unsqueeze(-1),
    "a small number in the denominator": lambda s: s.sigmoid() / (s.sigmoid().sum(-1, keepdim=True) + 1e-6),
    "a denominator kept from zero": lambda s: s.exp() / s.exp().sum(-1, keepdim=True).clamp(min=1e-12),
    "shares of magnitudes": lambda s: s / (s.abs().sum(-1, keepdim=True) + 1e-3),
    "a sink": lambda s: s.exp() / (1 + s.exp().sum(-1, keepdim=True)),
    "times the reciprocal of the sum": lambda s: s.exp() * s.exp().sum(-1, keepdim=True).reciprocal(),
    "times one over the sum": lambda s: (1 / s.exp().sum(-1, keepdim=True)) * s.exp(),
    "less the logarithm of the sum": lambda s: (s - s.exp().sum(-1, keepdim=True).log()).exp(),
    "less its maximum and a logarithm": lambda s: _less_logarithm(s, s.amax(-1, keepdim=True)),
    "computed twice": lambda s: (s - s.amax(-1, True)).exp() / (s - s.amax(-1, True)).exp().sum(-1, keepdim=True),
}
NONE: dict[str, Callable[[Q], Q]] = {
    "the sum of other powers": lambda s: s.exp() / (2 * s).exp().sum(-1, keepdim=True),
    "the sum along another axis": lambda s: s.exp() / s.exp().sum(-1).mean(-1)[..., None, None],
    "powers of two bases": lambda s: s.exp2() / s.exp().sum(-1, keepdim=True),
    "a logarithm of other scores": lambda s: (s - (2 * s).logsumexp(-1, keepdim=True)).exp(),
    "times the reciprocal of another sum": lambda s: s.exp() * (2 * s).exp().sum(-1, keepdim=True).reciprocal(),
    "less a logarithm of another sum": lambda s: (s - (2 * s).exp().sum(-1, keepdim=True).log()).exp(),
    "signed shares": lambda s: s / s.sum(-1, keepdim=True),
}


def _less_maximum(s: Q, highest: Q) -> Q:
    powers = (s - highest).exp()
    return powers / powers.sum(-1, keepdim=True)


def _less_logarithm(s: Q, highest: Q) -> Q:
    total = (s - highest).exp().sum(-1, keepdim=True)
    return (s - (highest + total.log())).exp()


def test_every_row_is_spelled() -> None:
    assert set(SPELLINGS) >= {*_SOFTMAXES, *_LOGS}


@pytest.mark.parametrize("target", SPELLINGS, ids=lambda t: str(t).removeprefix("aten."))
def test_each_row_is_a_softmax(target: object) -> None:
    check(SPELLINGS[target], target)


@pytest.mark.parametrize("name", OTHERS)
def test_each_spelling_is_a_softmax(name: str) -> None:
    check(OTHERS[name])


def check(weights: Callable[[Q], Q], target: object = None) -> None:
    sites = found(Model(weights), *inputs())
    if target is not None:
        assert any(n.target is target for n in sites.of.facts.nodes), "another operator was traced"
    assert len(sites.lifted) == 1, [x.reason for x in sites.refused]
    assert all(x < 1e-9 for x in differences(sites).values())


@pytest.mark.parametrize("name", NONE)
def test_what_looks_like_one_is_none(name: str) -> None:
    """Found as anything else, it still gives what the model gives."""
    sites = found(Model(NONE[name]), *inputs())
    assert all(x < 1e-9 for x in differences(sites).values())
    assert not [x for x in sites.lifted if x.attention.normalizer == "softmax"]


def test_a_row_of_minus_infinity() -> None:
    """The safe softmax gives zeros, the plain one NaN."""
    of = Asked(lambda s: (aten._safe_softmax(s, -1), aten.softmax.int(s, -1)), torch.randn(2, 3))
    safe, plain = normalisers(of.facts)
    assert isinstance(safe, Anchor) and isinstance(plain, Anchor)
    assert (safe.empty, plain.empty) == ("zero", None)
