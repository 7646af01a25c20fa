"""Loads as views: what an element-wise node reads of a tensor, over the grid of its axes, in plain traceable torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from attncc.ir.attention import Axis
from attncc.ir.evaluate import Evaluator
from attncc.ir.expr import Const, Expr, Index, Load, Op, loads


def is_view(load: Load, axes: Sequence[Axis]) -> bool:
    """Whether a load is a permutation of some of the axes, each at most once, and constants. An axis of known extent
    may begin further on."""
    own = [_plain(x, axes) for x in load.index if not isinstance(x, Const)]
    known = {x.index for x in axes}
    return len(set(own)) == len(own) and all(isinstance(x, Index) and x in known for x in own)


def _plain(x: Expr, axes: Sequence[Axis]) -> Expr:
    """The index of `index + constant`; another expression itself."""
    if isinstance(x, Op) and x.name == "add" and isinstance(x.args[0], Index) and isinstance(x.args[1], Const):
        (found,) = [a for a in axes if a.index is x.args[0]] or [None]
        if found is not None and isinstance(found.extent, Const) and x.args[1].value >= 0:
            return found.index
    return x


def view_of(
    load: Load, source: torch.Tensor, axes: Sequence[Axis], shape: Sequence[Expr] = ()
) -> torch.Tensor:  # fmt: skip
    """What a load that `is_view` reads, with one dimension per axis: of extent 1 for those that the load has not.
    `shape` is that of the tensor, where an axis may be shorter than its dimension."""
    for dim in reversed(range(len(load.index))):
        at = load.index[dim]
        if isinstance(at, Const):
            source = source.select(dim, int(at.value))
        elif isinstance(at, Op):  # an axis that begins further on
            (extent,) = [int(a.extent.value) for a in axes if a.index is at.args[0] and isinstance(a.extent, Const)]
            assert isinstance(at.args[1], Const)
            source = source.narrow(dim, int(at.args[1].value), extent)
        elif shape:  # an axis that ends earlier
            (extent,) = [a.extent for a in axes if a.index is at]
            known = isinstance(extent, Const) and isinstance(shape[dim], Const) and extent is not shape[dim]
            source = source.narrow(dim, 0, int(extent.value)) if known and isinstance(extent, Const) else source
    own = [_plain(x, axes) for x in load.index if not isinstance(x, Const)]
    present = [x.index for x in axes if x.index in own]
    order = [own.index(x) for x in present]
    source = source if order == sorted(order) else source.permute(order)
    for dim, axis in enumerate(axes):
        if axis.index not in own:
            source = source.unsqueeze(dim)
    return source


def over_axes(
    root: Expr, axes: Sequence[Axis], tensors: Mapping[str, torch.Tensor], compute: torch.dtype,
    grid: Mapping[Expr, torch.Tensor], shapes: Mapping[str, Sequence[Expr]] | None = None,
) -> torch.Tensor:  # fmt: skip
    """`root` over all axes, in `compute`: one dimension per axis, of extent 1 where the value does not depend on it.

    `shapes` are those of the tensors, where axes may be shorter than dimensions. `grid` binds the indices and sizes
    that are not reached through views; it may be empty where there are none."""
    ev = Evaluator(grid, tensors, compute, like=next(iter(tensors.values())))
    for x in loads(root):
        if is_view(x, axes):
            value = view_of(x, tensors[x.tensor], axes, (shapes or {}).get(x.tensor, ()))
            ev.known[x] = value.to(compute) if x.kind == "float" else value
    return ev(root)
