"""Samples of the keyed model, and a model compiled under a plan."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from attncc.plans.profile import Settings
from planned.keyed import sample

FEW = Settings(samples=4, probes=2, tune=2)
NEAR = ["streaming{sinks=16,window=64}", "streaming{sinks=64,window=128}"]


def samples(count: int, first: int = 100) -> Iterator[Tensor]:
    return (sample(seed) for seed in range(first, first + count))


def follow(model: nn.Module, known: object, **options: Any) -> Any:
    torch.compiler.reset()
    return torch.compile(model, backend="attncc", options={"plan": known, "inductor": False, **options})
