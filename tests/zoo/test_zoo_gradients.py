"""Spellings of the zoo in training: gradients of every parameter and float input of a compiled model are within twice
eager's own error against float64, and a rounding, with the kernels that run on this machine."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from zoo.case import Case
from zoo.guards import GUARDS
from zoo.run import cast, floats
from zoo.spellings import SPELLINGS

from attncc.driver.backend import Collected, collecting

FACTOR = 2.0
#: What rounding a gradient may cost, in roundings of the largest element of its tensor: results, weights, and their
#: gradients are rounded once each, in another order than eager's.
ROUNDINGS = 4
HELD = (*SPELLINGS, *GUARDS)
#: Rows of which all scores are -100: the log of their sum alone is not near enough.
ALWAYS = {"fill-minus-100"}
assert {case.name for case in HELD} >= ALWAYS

pytestmark = pytest.mark.filterwarnings("ignore")


def gradients(run: Callable[..., Any], model: nn.Module, inputs: Any) -> list[torch.Tensor | None]:
    args, kwargs = inputs
    given = [x for x in tree_leaves(inputs) if isinstance(x, torch.Tensor) and x.is_floating_point() and x.is_leaf]
    leaves = [*(p for p in model.parameters() if p.requires_grad), *(x.requires_grad_() for x in given)]
    with torch.enable_grad():
        outs = [x for x in floats(run(*args, **kwargs)) if x.requires_grad]
        loss = sum((x.double() * torch.arange(x.numel(), dtype=torch.float64).cos().view(x.shape)).sum() for x in outs)
        found = torch.autograd.grad(loss, leaves, allow_unused=True) if outs else [None] * len(leaves)
    return [None if g is None else g.double() for g in found]


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want)[want.isfinite()].square().mean().sqrt()) if bool(want.isfinite().any()) else 0.0


def trained(case: Case, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, args, kwargs = case.make()
    model = model.to(dtype)
    inputs = cast((args, kwargs), dtype)
    exact, eager = copy.deepcopy(model).double(), copy.deepcopy(model)
    try:
        want = gradients(exact, exact, cast(inputs, torch.float64))
        own = gradients(eager, eager, cast(inputs, dtype))
    except (RuntimeError, NotImplementedError, TypeError) as error:
        pytest.skip(f"the model itself has no gradients: {error}")
    torch._dynamo.reset()
    found = Collected()
    token = collecting.set(found)
    try:
        options = {"inductor": False, "measure": False}
        run = torch.compile(model, backend="attncc", dynamic=True if case.dynamic else None, options=options)
        got = gradients(run, model, cast(inputs, dtype))
    finally:
        collecting.reset(token)
        torch._dynamo.reset()
    assert not found.notes
    compare(got, own, want, dtype)


def compare(
    got: Sequence[torch.Tensor | None], own: Sequence[torch.Tensor | None], want: Sequence[torch.Tensor | None],
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """A gradient that is zero but for the rounding of float64 (what is added to a whole row of scores has no effect) is
    a sum that cancels, and is measured by the largest of all."""
    eps = torch.finfo(dtype).eps
    sizes = [float(w.nan_to_num().abs().max()) if w is not None and w.numel() else 0.0 for w in want]
    steepest = max(sizes, default=0.0)
    for n, (g, o, w, size) in enumerate(zip(got, own, want, sizes, strict=True)):
        if w is None or o is None or not w.numel():
            assert g is None or not bool(g.any()) or o is not None, f"gradient {n} is given, eager has none"
            continue
        assert g is not None, f"gradient {n} is missing"
        known = w.isfinite() & o.isfinite()
        assert bool(g[known].isfinite().all()), f"gradient {n} is not finite where eager's is"
        floor = ROUNDINGS * eps * (steepest if size < 1e-12 * steepest else size)
        g, o, w = (torch.where(known, x, 0.0) for x in (g, o, w))
        assert off(g, w) <= FACTOR * off(o, w) + floor, f"gradient {n}: {off(g, w):.3g}, eager {off(o, w):.3g}"


runs = [
    pytest.param(case, id=case.name, marks=[] if case.name in ALWAYS else [pytest.mark.full]) for case in HELD
]  # fmt: skip


@pytest.mark.parametrize("case", runs)
def test_gradients(case: Case) -> None:
    trained(case, torch.float32)
