"""Inputs that are views with a sign of their own: conjugates, and the imaginary parts of these.

Such a tensor holds the numbers of another, and a bit says that they are conjugated, or negated. Inductor reads the
memory and not the bit, so the compiled graph is given the numbers themselves.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx


def signed_inputs(inputs: Sequence[Any]) -> tuple[int, ...]:
    """The places of the inputs whose memory does not hold their numbers."""
    return tuple(n for n, x in enumerate(inputs) if isinstance(x, torch.Tensor) and (x.is_neg() or x.is_conj()))


def may_write(graph: fx.Graph) -> bool:
    """Whether a graph may write to its inputs: what it wrote to their copies would be lost."""
    names = ((n, str(getattr(n.target, "__name__", n.target))) for n in graph.nodes if n.op.startswith("call"))
    return any(n.target is operator.setitem or "out" in n.kwargs or _in_place(name) for n, name in names)


def _in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def with_their_numbers(call: Callable[..., Any], places: Sequence[int]) -> Callable[..., Any]:
    """`call` with the inputs at some places made tensors of their numbers, of the same strides. Gradients pass."""

    def run(*inputs: Any) -> Any:
        given = list(inputs)
        for n in places:
            x = given[n]
            given[n] = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=x.device).copy_(x)
        return call(*given)

    return run
