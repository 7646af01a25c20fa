"""What a plan costs a sample: how far the model's output under the plan is from the exact one.

    kl      mean over tokens of KL(exact prediction || planned prediction), nats
    flips   share of the tokens whose most likely one changes, among those where the exact model is not undecided
    rel     |planned - exact| / |exact|
    or a function of the user: (exact output, planned output, inputs) -> float
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attncc.errors import PlanError

#: A token counts for `flips` where the exact model prefers its first choice to its second by this much probability.
MARGIN = 0.1
#: Tokens whose predictions are compared at once: a vocabulary is large.
_AT_ONCE = 512

Loss = Callable[[torch.Tensor, torch.Tensor, "torch.Tensor | None"], float]
_BUDGET = re.compile(r"\s*(?P<metric>[\w:.]+)\s*<=\s*(?P<limit>[0-9.eE+-]+)\s*(?:@\s*(?P<share>[0-9.]+)\s*%)?\s*$")


@dataclass(frozen=True)
class Asked:
    """A budget as it was asked for: the loss of a sample is at most `limit`, for a share `share` of inputs."""

    metric: str
    limit: float
    share: float = 0.95


def parse_budget(text: str) -> Asked:
    """The budget that a text like `kl<=0.02@95%` asks for. Raises PlanError."""
    found = _BUDGET.match(text)
    try:
        if found is None:
            raise ValueError
        asked = Asked(found["metric"], float(found["limit"]), float(found["share"] or 95) / 100)
    except ValueError:
        raise PlanError(
            f"the budget {text!r} is not like 'kl<=0.02@95%': a metric ({', '.join(METRICS)} or module:function), a "
            "limit, and for how many of 100 inputs it holds"
        ) from None
    if not asked.limit > 0:
        raise PlanError(f"the budget {text!r} has a limit that is not above 0")
    if not 0 < asked.share < 1:
        raise PlanError(f"the budget {text!r} holds for more than 0 and less than 100 % of inputs")
    return asked


def _flat(exact: torch.Tensor, planned: torch.Tensor, valid: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions, (tokens, vocabulary)."""
    a, b = (x.reshape(-1, x.shape[-1]) for x in (exact, planned))
    if valid is None:
        return a, b
    at = valid.reshape(-1)
    return a[at], b[at]


def kl(exact: torch.Tensor, planned: torch.Tensor, valid: torch.Tensor | None = None) -> float:
    a, b = _flat(exact, planned, valid)
    total = 0.0
    for x, y in zip(a.split(_AT_ONCE), b.split(_AT_ONCE), strict=True):
        p, q = x.float().log_softmax(-1), y.float().log_softmax(-1)
        total += (p.exp() * (p - q)).sum(dtype=torch.float64).item()
    return max(total, 0.0) / max(len(a), 1)  # rounding may leave it below 0


def flips(exact: torch.Tensor, planned: torch.Tensor, valid: torch.Tensor | None = None) -> float:
    a, b = _flat(exact, planned, valid)
    counted = changed = 0
    for x, y in zip(a.split(_AT_ONCE), b.split(_AT_ONCE), strict=True):
        best = x.float().softmax(-1).topk(2, -1)
        sure = best.values[:, 0] - best.values[:, 1] >= MARGIN
        counted += int(sure.sum())
        changed += int((sure & (best.indices[:, 0] != y.argmax(-1))).sum())
    return changed / max(counted, 1)


def rel(exact: torch.Tensor, planned: torch.Tensor, valid: torch.Tensor | None = None) -> float:
    a, b = exact.double(), planned.double()
    if valid is not None:
        at = valid.reshape(valid.shape + (1,) * (a.dim() - valid.dim()))
        a, b = a * at, b * at
    return ((a - b).norm() / a.norm().clamp_min(torch.finfo(torch.float64).tiny)).item()


METRICS: dict[str, Loss] = {"kl": kl, "flips": flips, "rel": rel}
#: Metrics of predictions: the last axis of the output is a vocabulary.
OF_PREDICTIONS = ("kl", "flips")


def output_of(found: Any) -> torch.Tensor:
    """The tensor that a model's output is compared by: `logits` where it has them, else the first tensor of floats.
    Raises PlanError."""
    logits = getattr(found, "logits", None)
    if isinstance(logits, torch.Tensor):
        return logits
    if isinstance(found, torch.Tensor) and found.is_floating_point():
        return found
    parts: Sequence[Any] = ()
    if isinstance(found, Mapping):
        parts = list(found.values())
    elif isinstance(found, tuple | list):
        parts = found
    for part in parts:
        if isinstance(part, torch.Tensor) and part.is_floating_point():
            return part
    raise PlanError(f"the model gives {type(found).__name__}, which has no floating-point tensor to compare")


def valid_of(inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
    """Which tokens of an output count: those that an `attention_mask` among the inputs, of the same tokens, shows."""
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or tuple(output.shape[:2]) != tuple(mask.shape):
        return None
    return mask.bool()
