"""A row compiled, beside the same in float64: its outputs, and gradients of what learns."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attncc.bench.systems.system import System
from attncc.driver.backend import Collected, attncc_backend, collecting
from attncc.driver.recording import report
from attncc.report.site import Site


@dataclass(frozen=True)
class Compiled:
    """`errors` of the compiled model, `own` those of eager, each the largest beside float64 by the largest element."""

    sites: tuple[Site, ...]
    errors: tuple[float, ...]
    own: tuple[float, ...]

    def holds(self) -> bool:
        return all(e <= 4 * o + 5e-6 for e, o in zip(self.errors, self.own, strict=True))


def compiled(system: System, *, trains: bool) -> Compiled:
    """Every attention of the row by its kernel, none measured."""
    torch._dynamo.reset()
    model, inputs = system.make(False)
    wide = copy.deepcopy(model).double(), tuple(x.double() if x.is_floating_point() else x for x in inputs)
    found = Collected()
    token = collecting.set(found)
    try:
        run = torch.compile(
            model, backend=attncc_backend, options={"inductor": False, "measure": False}, dynamic=False
        )  # fmt: skip
        got = results(run, model, inputs, trains=trains)
    finally:
        collecting.reset(token)
    exact = results(wide[0], *wide, trains=trains)
    own = results(model, model, inputs, trains=trains)
    return Compiled(report(found).sites, _apart(got, exact), _apart(own, exact))


def results(run: object, model: nn.Module, inputs: tuple[Tensor, ...], *, trains: bool) -> list[Tensor]:
    """Floats that a call gives; where it trains, gradients of inputs and parameters too."""
    given = [x.detach().requires_grad_(trains and x.is_floating_point()) for x in inputs]
    with torch.set_grad_enabled(trains):
        out = run(*given)  # type: ignore[operator]
    outs = [x for x in (out if isinstance(out, tuple) else (out,)) if x.is_floating_point()]
    if not trains:
        return outs
    leaves = [*(x for x in given if x.requires_grad), *model.parameters()]
    by = torch.Generator().manual_seed(2)
    learning = [x for x in outs if x.requires_grad]
    seeds = [torch.randn(x.shape, generator=by).to(x.dtype) for x in learning]
    grads = torch.autograd.grad(learning, leaves, seeds, allow_unused=True)
    return [*(x.detach() for x in outs), *(torch.zeros(1) if g is None else g for g in grads)]


def _apart(found: list[Tensor], exact: list[Tensor]) -> tuple[float, ...]:
    assert [x.shape for x in found] == [x.shape for x in exact]
    scales = (y.abs().max().clamp(min=1e-3) if y.numel() else torch.tensor(1.0) for y in exact)
    return tuple(float((x.double() - y.double()).abs().max() / s) for x, y, s in zip(found, exact, scales, strict=True))
