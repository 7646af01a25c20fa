"""Outputs and gradients of a compiled model against those of the model itself, in float64.

Kernels are the interpreter, so what differs was read wrongly; gradients are those of the plain-torch form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from random_models.check import kernels_of

from attncc.driver import backend
from attncc.report.site import Site

Q = torch.Tensor


@dataclass(frozen=True)
class Compared:
    """What was said of each site, and how far outputs and gradients are off: infinite where one is missing."""

    sites: list[Site]
    output: float
    gradients: dict[str, float]

    @property
    def worst(self) -> float:
        return max(self.output, *self.gradients.values(), 0.0)

    @property
    def statuses(self) -> list[str]:
        return [s.status for s in self.sites]


def compared(
    model: Callable[..., Q], *inputs: Q, dynamic: bool = False, oracle: Callable[..., Q] | None = None
) -> Compared:
    """Run a model and its compiled form (or `oracle` in the model's place) on copies of the inputs, those that require
    gradients with them: a loss that weighs each element of the output otherwise."""
    expected = _run(oracle or model, inputs)
    found = backend.Collected()
    token = backend.collecting.set(found)
    torch._dynamo.reset()
    try:
        with kernels_of("oracle"):
            compiled = torch.compile(
                model, backend=backend.attncc_backend, options={"inductor": False, "measure": False}, dynamic=dynamic
            )
            given = _run(compiled, inputs)
    finally:
        backend.collecting.reset(token)
    assert found.notes == [], found.notes
    far = [_far(a, b) for a, b in zip(expected, given, strict=True)]
    return Compared(found.sites, far[0], {f"input {n}": x for n, x in enumerate(far[1:])})


def _run(f: Callable[..., Q], inputs: Sequence[Q]) -> list[Q | None]:
    """The output, and the gradient of each input (None where there is none)."""
    copies = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    out = f(*copies)
    if out.requires_grad:
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        (out * weights).sum().backward()
    return [out.detach(), *(x.grad for x in copies)]


def _far(a: Q | None, b: Q | None) -> float:
    """The largest difference, relative to the largest number; NaN must meet NaN."""
    if a is None or b is None:
        return 0.0 if a is b else float("inf")
    if a.numel() == 0:
        return 0.0
    same = torch.equal(a.isnan(), b.isnan())
    a, b = a.nan_to_num(0.0), b.nan_to_num(0.0)
    return float((a - b).abs().max() / a.abs().max().clamp(min=1e-3)) if same else float("inf")


def inputs(*shapes: Sequence[int], seed: int = 0, grad: bool = True) -> list[Any]:
    """Random float64 tensors that require gradients."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_(grad) for s in shapes]
