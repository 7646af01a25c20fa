"""Masks that a file holds as data, where they follow a rule: the rule takes the place of the data in what is read."""

from __future__ import annotations

from collections.abc import Callable

import torch


def spelled(x: torch.Tensor) -> Callable[[], torch.Tensor] | None:
    """What makes a tensor of (.., rows, keys) that says `j <= i + offset`, in booleans or in two numbers; None where it
    says something else."""
    rows, keys = x.shape[-2:]
    flat = x.reshape(-1, rows, keys)
    if x.is_complex() or not torch.equal(flat, flat[:1].expand_as(flat)):
        return None
    last, first = flat[0, 0, -1].item(), flat[0, -1, 0].item()
    if last == first or last != last or first != first:
        return None
    low = flat[0] == first
    offset = int(low[0].sum()) - 1
    causal = torch.ones(rows, keys, dtype=torch.bool).tril(offset)
    if not torch.equal(low, causal) or not torch.equal(flat[0] == last, ~causal):
        return None
    shape, dtype = x.shape, x.dtype

    def make() -> torch.Tensor:
        visible = torch.arange(keys) <= torch.arange(rows)[:, None] + offset
        if dtype == torch.bool:
            made = visible if first else ~visible
        else:
            made = torch.where(visible, torch.full((), first, dtype=dtype), torch.full((), last, dtype=dtype))
        return made.expand(shape)

    return make
