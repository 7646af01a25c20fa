"""Loads as views: what an element-wise node reads of a tensor, over the grid of its axes, in plain traceable torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from attncc.ir.attention import Axis
from attncc.ir.evaluate import Evaluator
from attncc.ir.expr import Const, Expr, Index, Load, loads


def is_view(load: Load, axes: Sequence[Axis]) -> bool:
    """Whether a load is a permutation of some of the axes, each at most once, and constants."""
    own = [x for x in load.index if not isinstance(x, Const)]
    known = {x.index for x in axes}
    return len(set(own)) == len(own) and all(isinstance(x, Index) and x in known for x in own)


def view_of(load: Load, source: torch.Tensor, axes: Sequence[Axis]) -> torch.Tensor:
    """What a load that `is_view` reads, with one dimension per axis: of extent 1 for those that the load has not."""
    for dim in reversed(range(len(load.index))):
        at = load.index[dim]
        if isinstance(at, Const):
            source = source.select(dim, int(at.value))
    own = [x for x in load.index if not isinstance(x, Const)]
    present = [x.index for x in axes if x.index in own]
    order = [own.index(x) for x in present]
    source = source if order == sorted(order) else source.permute(order)
    for dim, axis in enumerate(axes):
        if axis.index not in own:
            source = source.unsqueeze(dim)
    return source


def over_axes(
    root: Expr, axes: Sequence[Axis], tensors: Mapping[str, torch.Tensor], compute: torch.dtype,
    grid: Mapping[Expr, torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    """`root` over all axes, in `compute`: one dimension per axis, of extent 1 where the value does not depend on it.

    `grid` binds the indices and sizes that are not reached through views; it may be empty where there are none."""
    ev = Evaluator(grid, tensors, compute, like=next(iter(tensors.values())))
    for x in loads(root):
        if is_view(x, axes):
            value = view_of(x, tensors[x.tensor], axes)
            ev.known[x] = value.to(compute) if x.kind == "float" else value
    return ev(root)
