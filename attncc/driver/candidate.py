"""What is decided about: a site with the kernel that it would run. And what is decided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from attncc.ir import Attention
from attncc.ir.reasons import Reason, because
from attncc.kernels.build import Built
from attncc.patterns.site.assemble import Lifted
from attncc.runtime.measure import Decision


@dataclass(frozen=True)
class Candidate:
    """A site with the attention that its kernel runs, the text of that, and the kernel. `learned` names the tensors
    whose gradients are wanted; with none, forward is all that runs."""

    site: Lifted
    final: Attention
    spec: str
    made: Built
    learned: tuple[str, ...] = ()


@dataclass(frozen=True)
class Choice:
    """Whether the kernel takes the site, by what ratio of times it beats the alternative (if known), and why. `us` are
    the microseconds of a call of each candidate that was measured."""

    fused: bool
    speedup: float | None
    reason: Reason
    us: Mapping[str, float] = field(default_factory=dict)


def settled(fused: bool, speedup: float | None, decision: Decision) -> Choice:
    """What a measurement decided."""
    return Choice(fused, speedup, because("faster" if fused else "slower", decision.reason), decision.us)


def unmeasured(trains: bool, why: str) -> Choice:
    """What becomes of sites that cannot be measured: fused in inference, kept in training."""
    return Choice(not trains, None, because("training-not-measured" if trains else "not-measured", why))
