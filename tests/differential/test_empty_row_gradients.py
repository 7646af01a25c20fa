"""Gradients of rows that see no key under finite masks: added numbers let them through, fills do not."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from gradients.compared import compared, inputs
from torch.nn.attention import SDPBackend, sdpa_kernel

Q = torch.Tensor
H, N, D = 2, 6, 4
LOW = torch.finfo(torch.float32).min

#: Hides rows 1 and 4 whole, and some keys of others.
HIDDEN = torch.zeros(N, N, dtype=torch.bool)
HIDDEN[1] = HIDDEN[4] = True
HIDDEN[2, 3:] = HIDDEN[5, :2] = True


def low(by: float = LOW) -> Q:
    return torch.zeros(N, N, dtype=torch.float64).masked_fill(HIDDEN, by)


MASKED: dict[str, Callable[[Q, Q], Q]] = {
    "added": lambda x, b: x + low(),
    "added to a bias": lambda x, b: x + b + low(),
    "added with a bias": lambda x, b: x + (b + low()),
    "added twice": lambda x, b: x + low(-1e38) + low(-1e38),
    "added large": lambda x, b: x + low(-1e30),
    "subtracted": lambda x, b: x - -low(),
    "added to a scale": lambda x, b: x * b.sum() + low(),
    "filled": lambda x, b: x.masked_fill(HIDDEN, LOW),
    "filled with less": lambda x, b: x.masked_fill(HIDDEN, -1e9),
    "filled, then a bias": lambda x, b: x.masked_fill(HIDDEN, LOW) + b,
    "filled, then a fixed bias": lambda x, b: x.masked_fill(HIDDEN, LOW) + b.detach(),
    "filled, then scaled": lambda x, b: (x + b).masked_fill(HIDDEN, LOW),
    "chosen": lambda x, b: torch.where(HIDDEN, LOW, x + b),
    "added, then kept above": lambda x, b: torch.max(x + b + low(), torch.tensor(LOW).double()),
    "added, then clamped": lambda x, b: (x + low()).clamp(min=LOW),
    "filled, then kept above": lambda x, b: torch.max(x.masked_fill(HIDDEN, LOW), torch.tensor(LOW).double()),
    "filled infinite, then kept above": lambda x, b: torch.max(
        x.masked_fill(HIDDEN, -torch.inf), torch.tensor(LOW).double()),
    "stopped, then added": lambda x, b: x.detach() + b + low(),
    "added, then stopped": lambda x, b: (x + low()).detach() + b,
    "only the bias": lambda x, b: x.detach() + (b + low()),
}  # fmt: skip

#: Where a fill comes to stand beside a bias, rows without keys follow one part of their scores and not the other.
KEPT = {"filled, then a bias"}


@pytest.mark.parametrize("name", MASKED)
def test_finite_masks(name: str) -> None:
    found = compared(
        lambda q, k, v, b: MASKED[name](q @ k.mT, b).softmax(-1) @ v, *inputs((H, N, D), (H, N, D), (H, N, D), (N, N))
    )
    assert found.worst < 1e-9
    assert found.statuses == (["refused"] if name in KEPT else ["fused"])


@pytest.mark.parametrize("bias", (False, True))
def test_a_causal_mask_hides_no_row(bias: bool) -> None:
    """Then nothing is said of rows without keys."""
    causal = torch.zeros(N, N, dtype=torch.float64).masked_fill(torch.ones(N, N).triu(1).bool(), LOW)

    def model(q: Q, k: Q, v: Q, b: Q) -> Q:
        place = torch.arange(N)
        mask = torch.where(place <= place[:, None], 0.0, LOW).double() if not bias else causal
        return (q @ k.mT + (b if bias else 0.0) + mask).softmax(-1) @ v

    found = compared(model, *inputs((H, N, D), (H, N, D), (H, N, D), (N, N)))
    assert found.worst < 1e-9
    assert found.statuses == ["fused"]


@pytest.mark.parametrize("kind", ("added", "bias", "bool"))
def test_sdpa(kind: str) -> None:
    """Against its own formula: torch's kernels for a CPU are wrong themselves in such rows."""

    def mask(b: Q) -> Q:
        return ~HIDDEN if kind == "bool" else low() + b if kind == "bias" else low()

    def model(q: Q, k: Q, v: Q, b: Q) -> Q:
        return F.scaled_dot_product_attention(q, k, v, mask(b))

    given = inputs((1, H, N, D), (1, H, N, D), (1, H, N, D), (N, N))
    with sdpa_kernel(SDPBackend.MATH):
        found = compared(model, *given)
    assert found.worst < 1e-9
    assert found.statuses == ["fused"]


def test_a_sink_leaves_such_rows_empty() -> None:
    def model(q: Q, k: Q, v: Q, s: Q) -> Q:
        logits = torch.cat([q @ k.mT + low(), s.expand(H, N, 1)], -1)
        return logits.softmax(-1)[..., :-1] @ v

    found = compared(model, *inputs((H, N, D), (H, N, D), (H, N, D), (H, 1, 1)))
    assert found.worst < 1e-9
    assert found.statuses == ["fused"]


def test_sums_of_rows_have_gradients_of_their_own() -> None:
    def model(q: Q, k: Q, v: Q) -> Q:
        x = q @ k.mT + low()
        return x.softmax(-1) @ v + x.logsumexp(-1, keepdim=True).clamp(min=-10)

    found = compared(model, *inputs((H, N, D), (H, N, D), (H, N, D)))
    assert found.worst < 1e-9


@pytest.mark.parametrize("sink", (False, True))
def test_large_scores(sink: bool) -> None:
    """The sum of such a row, rounded, is too rough to make its weights again of."""

    def model(q: Q, k: Q, v: Q, b: Q) -> Q:
        x = q @ k.mT + 3e15
        return torch.cat([x, b + 3e15], -1).softmax(-1)[..., :-1] @ v if sink else (x + b).softmax(-1) @ v

    found = compared(model, *inputs((H, N, D), (H, N, D), (H, N, D), (H, N, 1)))
    assert found.worst < 1e-9
    assert found.statuses == ["fused"]
