"""Running one model of the zoo three ways: in float64, eagerly in its dtype, and compiled."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from attncc.driver import rewriting
from attncc.driver.backend import Collected, collecting
from attncc.driver.recording import report
from attncc.patterns.graph.facts import Facts
from attncc.report.model import Report
from zoo.case import Case


@dataclass(frozen=True)
class Error:
    """How far the compiled model and the eager one are from float64, in the largest element."""

    what: str
    compiled: float
    eager: float
    floor: float  # what rounding the result alone may cost

    def fine(self, factor: float) -> bool:
        return self.compiled <= factor * self.eager + self.floor


@dataclass(frozen=True)
class Lifting:
    """A graph that was lifted from: whether it is the same afterwards, and how many nodes were made beside it."""

    same: bool
    made: int


@dataclass(frozen=True)
class Outcome:
    report: Report
    errors: tuple[Error, ...]
    liftings: tuple[Lifting, ...]


def floats(result: Any) -> list[torch.Tensor]:
    """The float tensors of a model's result, in order."""
    plain = result.to_tuple() if hasattr(result, "to_tuple") else result
    return [x for x in tree_leaves(plain) if isinstance(x, torch.Tensor) and x.is_floating_point()]


def cast(inputs: Any, dtype: torch.dtype) -> Any:
    """A copy of the inputs with floats, caches included, in `dtype`."""

    def one(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return x.to(dtype) if x.is_floating_point() else x.clone()
        x = copy.deepcopy(x)
        for layer in getattr(x, "layers", ()):  # a key-value cache of transformers
            layer.keys, layer.values = layer.keys.to(dtype), layer.values.to(dtype)
        return x

    return tree_map(one, inputs, is_leaf=lambda x: hasattr(x, "layers"))


def shorter(inputs: Any) -> Any:
    """The same with the sequences of tokens four shorter."""
    return tree_map(lambda x: x[:, :-4] if isinstance(x, torch.Tensor) and x.ndim == 2 else x, inputs)


def call(model: Any, inputs: Any, parameters: list[nn.Parameter]) -> dict[str, torch.Tensor]:
    """Outputs by name, and gradients of the parameters if there are any."""
    args, kwargs = inputs
    with torch.set_grad_enabled(bool(parameters)):
        outs = floats(model(*args, **kwargs))
    found = {f"output {n}": x.detach().double() for n, x in enumerate(outs)}
    if parameters:
        loss = sum((x * torch.arange(x.numel(), dtype=x.dtype).cos().view(x.shape)).sum() for x in outs)
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        found |= {f"gradient {n}": g.double() for n, g in enumerate(grads) if g is not None}
    return found


@cache
def outcome(case: Case, dtype: torch.dtype) -> Outcome:
    """Compile and run `case`. Models and inputs are made anew for each way, so state does not leak."""
    torch.manual_seed(0)
    model, args, kwargs = case.make()
    model = model.to(dtype)
    inputs = cast((args, kwargs), dtype)
    exact, eager = copy.deepcopy(model).double(), copy.deepcopy(model)
    torch._dynamo.reset()
    options = {"inductor": case.inductor, "measure": False}
    compiled = torch.compile(model, backend="attncc", dynamic=True if case.dynamic else None, options=options)
    found = Collected()
    token = collecting.set(found)
    liftings: list[Lifting] = []
    lift_all = rewriting.lift_all

    def watched(facts: Facts) -> Any:
        before = drawn(facts.graph)
        sites = lift_all(facts)
        liftings.append(Lifting(drawn(facts.graph) == before, len(facts.made)))
        return sites

    try:
        with mock.patch.object(rewriting, "lift_all", watched):
            errors = _compare(case, exact, eager, compiled, model, inputs, dtype)
            if case.dynamic:
                errors += _compare(case, exact, eager, compiled, model, shorter(inputs), dtype)
    finally:
        collecting.reset(token)
        torch._dynamo.reset()
    return Outcome(report(found), errors, tuple(liftings))


def drawn(graph: fx.Graph) -> tuple[str, list[tuple[str, list[str]]]]:
    """All that there is to a graph: its text, its nodes, and who uses them."""
    return str(graph), [(n.name, [user.name for user in n.users]) for n in graph.nodes]


def _compare(
    case: Case, exact: nn.Module, eager: nn.Module, compiled: Any, model: nn.Module, inputs: Any, dtype: torch.dtype
) -> tuple[Error, ...]:
    def parameters(of: nn.Module) -> list[nn.Parameter]:
        return [p for p in of.parameters() if p.requires_grad] if case.backward else []

    want = call(exact, cast(inputs, torch.float64), parameters(exact))
    own = call(eager, cast(inputs, dtype), parameters(eager))
    got = call(compiled, cast(inputs, dtype), parameters(model))
    assert list(got) == list(own) == list(want)
    gradients = [x for n, x in want.items() if n.startswith("gradient")]
    steepest = max((float(x.abs().nan_to_num().max()) for x in gradients), default=0.0)
    return tuple(_error(name, got[name], own[name], want[name], torch.finfo(dtype).eps, steepest) for name in want)


def _error(
    what: str, got: torch.Tensor, own: torch.Tensor, want: torch.Tensor, eps: float, steepest: float
) -> Error:  # fmt: skip
    """`steepest`: the largest element of all gradients. One that is zero but for the rounding of float64 (what is added
    to a whole row of scores has no effect) is a sum that cancels, and is measured by what is summed."""
    assert got.shape == own.shape == want.shape, f"{what} has the shape {tuple(got.shape)}"
    finite = want.isfinite() & own.isfinite()
    if not torch.equal(got.isfinite(), own.isfinite()):
        return Error(what, float("inf"), 0.0, 0.0)
    if not finite.any():
        return Error(what, 0.0, 0.0, 0.0)

    def largest(x: torch.Tensor) -> float:
        return float(x[finite].abs().max())

    cancels = what.startswith("gradient") and largest(want) < 1e-12 * steepest
    return Error(what, largest(got - want), largest(own - want), 4 * eps * (steepest if cancels else largest(want)))
