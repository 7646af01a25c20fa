"""Derivatives that no kernel computes: forward mode and gradients of gradients, through the interpreter.

It is plain torch, so torch differentiates it to any order and in either mode; and it makes every N x M object, as eager
attention does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attncc.ir import Attention, interpret


def outputs_of(a: Attention, tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
    """The outputs of an attention as torch can differentiate them."""
    named = {t.name: x for t, x in zip(a.tensors, tensors, strict=True)}
    found = interpret(a, named, sizes)
    return [found[name] for name in a.outputs]


def gradients_of(
    a: Attention, grads: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor], sizes: Sequence[int],
    wanted: Sequence[bool],
) -> list[torch.Tensor]:  # fmt: skip
    """Gradients of the `wanted` ones of `tensors`, which torch can differentiate with respect to all that is given."""
    with torch.enable_grad():
        own = [_apart(t, w) for t, w in zip(tensors, wanted, strict=True)]
        outputs = outputs_of(a, own, sizes)
        sources = [x for x, w in zip(own, wanted, strict=True) if w]
        return differentiated(outputs, sources, grads, create_graph=True)


def gradients_of_gradients(
    a: Attention, grads: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor], sizes: Sequence[int],
    wanted: Sequence[bool], seeds: Sequence[torch.Tensor], sources: Sequence[bool],
) -> list[torch.Tensor]:  # fmt: skip
    """What `gradients_of` passes back of `seeds` to the ones among (*grads, *tensors) that are `sources`."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        given = [_apart(t, w) for t, w in zip((*grads, *tensors), sources, strict=True)]
        first = gradients_of(a, given[: len(grads)], given[len(grads) :], sizes, wanted)
        chosen = [x for x, w in zip(given, sources, strict=True) if w]
        return differentiated(first, chosen, seeds, create_graph=again)


def _apart(t: torch.Tensor, wanted: bool) -> torch.Tensor:
    """A tensor with a gradient of its own, apart from that of what else is computed from `t`."""
    if not wanted:
        return t
    return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()


def differentiated(
    outputs: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], grads: Sequence[torch.Tensor], *,
    create_graph: bool = False,
) -> list[torch.Tensor]:  # fmt: skip
    """Gradients of `sources` for those of `outputs`, zero for what none of them depends on."""
    seeded = [(o, g.to(o.dtype)) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
    if not seeded or not sources:
        return [torch.zeros_like(x) for x in sources]
    found = torch.autograd.grad(
        [o for o, _ in seeded], sources, [g for _, g in seeded], create_graph=create_graph, allow_unused=True,
        materialize_grads=True,
    )  # fmt: skip
    return list(found)
