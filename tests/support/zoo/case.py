"""One model of the zoo: how to make it, and what a compiler of attention must see in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Made = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """`make` gives the model, ready to run in eval mode, with its arguments.

    `sites` counts true attentions, found or not; `kept` of them are understood and left as they are; `refused` counts
    what looks like one and is none. `missing` says why not every site is found yet. `why` says what this model adds to
    the zoo. `golden` names the site whose IR text is kept as a golden file. `dynamic` compiles with dynamic shapes.
    `inductor` has Inductor compile what is outside attention too, which takes longer. `backward` compares gradients of
    parameters too.
    """

    name: str
    make: Callable[[], Made]
    sites: int
    why: str
    kept: int = 0
    refused: int = 0
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    golden: int | None = None
    dynamic: bool = False
    inductor: bool = False
    backward: bool = False
    missing: str = ""


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights at which attention is far from uniform, so that a wrong mask or bias shows."""
    torch.manual_seed(seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for p in model.parameters():
            if not p.is_floating_point():
                continue
            if p.ndim < 2:
                p.add_(torch.randn(p.shape).to(p) * 0.2)
            elif id(p) in embeddings:
                p.normal_()
            else:
                p.normal_(std=(p.numel() / p.shape[0]) ** -0.5)
    return model.eval()
