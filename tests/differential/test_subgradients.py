"""Gradients where a function bends are torch's own: scores are whole numbers here, so that many lie on a bend."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from gradients.compared import compared

Q = torch.Tensor
H, N, D = 2, 8, 4

BENT: dict[str, Callable[[Q], Q]] = {
    "relu": lambda x: x.relu(),
    "relu in place": lambda x: x.clone().relu_(),
    "relu6": lambda x: F.relu6(x),
    "clamp": lambda x: x.clamp(0, 1),
    "clamp from below": lambda x: x.clamp(min=0),
    "clamp from above": lambda x: x.clamp(max=1),
    "clamp_min": lambda x: x.clamp_min(-1),
    "clamp_max": lambda x: x.clamp_max(2),
    "clamp by tensors": lambda x: torch.clamp(x, torch.tensor(-1.0).double(), torch.tensor(2.0).double()),
    "clamp in place": lambda x: x.clone().clamp_(-2, 2),
    "clip": lambda x: x.clip(-1, 3),
    "clamp to nothing": lambda x: x.clamp(1, 1),
    "clamp turned round": lambda x: x.clamp(2, -2),
    "hardtanh": lambda x: F.hardtanh(x),
    "hardtanh of its own": lambda x: F.hardtanh(x, -2.0, 3.0),
    "hardsigmoid": lambda x: F.hardsigmoid(x),
    "hardswish": lambda x: F.hardswish(x),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.25),
    "elu": lambda x: F.elu(x, 1.5),
    "celu": lambda x: F.celu(x, 0.5),
    "selu": lambda x: F.selu(x),
    "threshold": lambda x: F.threshold(x, 1.0, -0.5),
    "softplus": lambda x: F.softplus(x, threshold=2.0),
    "log_sigmoid": lambda x: F.logsigmoid(x),
    "silu": lambda x: F.silu(x),
    "gelu": lambda x: F.gelu(x),
    "mish": lambda x: F.mish(x),
    "prelu": lambda x: F.prelu(x, torch.tensor([0.3]).double()),
    "abs": lambda x: x.abs(),
    "sign": lambda x: x.sign() + x,
    "maximum": lambda x: torch.maximum(x, torch.zeros_like(x)),
    "minimum": lambda x: torch.minimum(x, torch.ones_like(x)),
    "maximum of two": lambda x: torch.maximum(x, x.mT),
    "max of two": lambda x: torch.max(x, -x),
    "where": lambda x: torch.where(x > 0, x, x * 0.5),
    "square of relu": lambda x: x.relu().square(),
    "power": lambda x: x**2 + x**3,
    "floor": lambda x: x.floor() + x.round() + x.ceil() + x.trunc() + x,
    "tanh of clamp": lambda x: x.clamp(-1, 1).tanh(),
    "nan_to_num": lambda x: x.nan_to_num(0.0),
    "relu of clamp": lambda x: x.clamp(-1, 1).relu() * 2,
    "less the maximum": lambda x: (x - x.amax(-1, keepdim=True)).relu() + x,
    "sum of bends": lambda x: x.relu() - x.clamp(max=0) * 0.5 + F.hardtanh(x),
}


def whole(seed: int = 0) -> list[Q]:
    """Queries and keys of whole numbers, the last queries all zero, and values."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randint(-1, 2, (H, N, D), generator=generator).double() for _ in range(2))
    q[:, N // 2 :] = 0
    v = torch.randn(H, N, D, generator=generator, dtype=torch.float64)
    return [x.requires_grad_() for x in (q, k, v)]


@pytest.mark.parametrize("name", BENT)
def test_of_scores(name: str) -> None:
    found = compared(lambda q, k, v: BENT[name](q @ k.mT).softmax(-1) @ v, *whole())
    assert found.worst < (1e-7 if name == "hardsigmoid" else 1e-9)  # whose gradient torch rounds to a float32
    assert found.statuses == ["fused"] or name in ("less the maximum", "maximum of two")


@pytest.mark.parametrize("name", ("relu", "clamp", "clamp from below", "hardtanh", "maximum", "square of relu"))
def test_of_weights_without_a_softmax(name: str) -> None:
    found = compared(lambda q, k, v: BENT[name](q @ k.mT) @ v, *whole())
    assert found.worst < 1e-9
    assert found.statuses == ["fused"]


@pytest.mark.parametrize("name", ("relu", "clamp", "clamp from below", "abs", "maximum"))
def test_of_a_bias(name: str) -> None:
    q, k, v = whole()
    bias = torch.arange(N * N).view(N, N).remainder(5).sub(2).double().requires_grad_()
    found = compared(lambda q, k, v, b: (q @ k.mT + BENT[name](b) * 0.5).softmax(-1) @ v, q, k, v, bias)
    assert found.worst < 1e-9
    assert found.statuses == ["fused"]


@pytest.mark.parametrize(
    "share", ("relu", "square of relu", "clamp from below", "maximum", "abs", "signed", "clipped", "softplus")
)
def test_shares_of_a_sum(share: str) -> None:
    """Weights that are zero pass gradients on that no logarithm has: such models are left alone."""

    def model(q: Q, k: Q, v: Q) -> Q:
        s = q @ k.mT
        if share in ("signed", "clipped"):
            return ((s.relu() if share == "clipped" else s) / (s.abs().sum(-1, keepdim=True) + 1)) @ v
        f = BENT[share](s)
        return (f / (f.sum(-1, keepdim=True) + 1)) @ v

    found = compared(model, *whole())
    assert found.worst < 1e-9
    assert ("fused" in found.statuses) == (share not in ("clamp from below", "maximum", "signed"))


def test_points_that_coincide() -> None:
    """`cdist` has no gradient at zero, where a root has an infinite one."""
    q, _, v = whole()
    for model in (
        lambda q, v: (-torch.cdist(q, q, compute_mode="use_mm_for_euclid_dist")).softmax(-1) @ v,
        lambda q, v: (-torch.cdist(q, q).square()).softmax(-1) @ v,
        lambda q, v: (-(q[:, :, None] - q[:, None]).square().sum(-1)).softmax(-1) @ v,
        lambda q, v: F.cosine_similarity(q[:, :, None], q[:, None], -1).softmax(-1) @ v,
    ):
        found = compared(model, q, v)
        assert found.worst < 1e-9
        assert found.statuses == ["fused"]


def test_without_gradients_ties_are_not_told_apart() -> None:
    for name in ("relu", "clamp", "hardtanh"):
        bent, given = BENT[name], [x.detach() for x in whole()]
        (site,) = compared(lambda q, k, v, bent=bent: bent(q @ k.mT).softmax(-1) @ v, *given).sites
        assert site.ir is not None
        assert "first" not in site.ir
