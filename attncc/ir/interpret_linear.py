"""The interpreter of linear attention: the recurrence step by step, in plain eager torch. It is the oracle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from attncc.ir.attention import Access, Axis
from attncc.ir.evaluate import Evaluator
from attncc.ir.expr import Expr, Load, loads
from attncc.ir.interpret import Result, extent, index_grid
from attncc.ir.linear import Linear, X, Z
from attncc.ir.views import is_view, view_of


def interpret_linear(
    a: Linear,
    tensors: Mapping[str, torch.Tensor],
    sizes: Sequence[int] = (),
    *,
    compute: torch.dtype = torch.float32,
) -> Result:
    """Outputs of `a` by name, in `compute`. Raises ValueError if the number of sizes is wrong."""
    if len(sizes) != len(a.sizes):
        raise ValueError(f"the linear attention declares {len(a.sizes)} sizes, got {len(sizes)}")
    table: dict[Expr, int] = dict(zip(a.sizes, sizes, strict=True))
    q, k, v, decay, rate = (x.to(compute) for x in operands(a, tensors, table, compute))
    state = initial_state(a, tensors, table, compute)
    total = torch.zeros_like(state[..., 0])
    outs: list[torch.Tensor] = []
    weights: list[torch.Tensor] = []
    steps = k.shape[-2]
    for j in range(steps):
        key, value = k[..., j, :, None], v[..., j, None, :]
        state = state * decay[..., j, :, :]
        if a.rule == "delta":
            value = value - (key * state).sum(-2, keepdim=True)
        state = state + key * value * rate[..., j, :, :]
        total = total + k[..., j, :]
        if a.sees == "past":
            outs.append((q[..., j, :, None] * state).sum(-2))
            weights.append((q[..., j, :] * total).sum(-1))
    out = torch.stack(outs, -2) if a.sees == "past" else q @ state
    weight = torch.stack(weights, -1) if a.sees == "past" else (q @ total[..., None])[..., 0]
    if a.over is not None:
        out = out / divisor(a, weight, tensors, table, compute)
    every = {"out": out, "state": state}
    return {name: every[name] for name in a.outputs}


class Operands(NamedTuple):
    """q' (*batch, i, d), k' (*batch, j, d), v (*batch, j, e), decay and rate (*batch, j, d, e)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    decay: torch.Tensor
    rate: torch.Tensor


def operands(
    a: Linear, tensors: Mapping[str, torch.Tensor], table: Mapping[Expr, int], compute: torch.dtype
) -> Operands:
    """What `a` reads, feature maps applied."""

    def over(axes: Sequence[Axis], x: Expr, element: Access | None = None) -> torch.Tensor:
        return over_axes(axes, x, tensors, table, compute, element)

    rows, keys, columns = (*a.batch, a.i, a.d), (*a.batch, a.j, a.d), (*a.batch, a.j, a.e)
    pair = (*a.batch, a.j, a.d, a.e)
    return Operands(
        over(rows, a.phi_q, a.q), over(keys, a.phi_k, a.k), over(columns, X, a.v), over(pair, a.decay),
        over(pair, a.rate),
    )  # fmt: skip


def over_axes(
    axes: Sequence[Axis], x: Expr, tensors: Mapping[str, torch.Tensor], table: Mapping[Expr, int],
    compute: torch.dtype, element: Access | None = None,
) -> torch.Tensor:  # fmt: skip
    """`x` over some axes, of their extents; `element` is what it calls `x`. What lies in a tensor as the axes do is
    a view of it."""
    ev = Evaluator(index_grid(axes, table, _device(tensors)), tensors, compute, checked=True)
    own = None if element is None else Load(element.tensor, element.index, "float")
    for load in (*loads(x), *(() if own is None else (own,))):
        if is_view(load, axes):
            source = tensors[load.tensor]
            for axis in axes:
                dim = load.index.index(axis.index) if axis.index in load.index else None
                if dim is not None and source.shape[dim] != extent(axis.extent, table):  # else torch would copy it back
                    source = source.narrow(dim, 0, extent(axis.extent, table))
            value = view_of(load, source, axes)
            ev.known[load] = value.to(compute) if load.kind == "float" else value
    if own is not None:
        ev.known[X] = ev(own)
    return ev(x).expand([extent(axis.extent, table) for axis in axes])


def initial_state(
    a: Linear, tensors: Mapping[str, torch.Tensor], table: Mapping[Expr, int], compute: torch.dtype
) -> torch.Tensor:
    """The state before the first token, (*batch, d, e)."""
    axes = (*a.batch, a.d, a.e)
    if a.state is None:
        shape = [extent(axis.extent, table) for axis in axes]
        return torch.zeros(shape, dtype=compute, device=_device(tensors))
    return over_axes(axes, X, tensors, table, compute, a.state)


def divisor(
    a: Linear, weight: torch.Tensor, tensors: Mapping[str, torch.Tensor], table: Mapping[Expr, int],
    compute: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """What the output is divided by, (*batch, i, 1), from the sum of weights (*batch, i)."""
    assert a.over is not None
    ev = Evaluator(index_grid((*a.batch, a.i), table, weight.device), tensors, compute, checked=True)
    ev.known[Z] = weight
    return ev(a.over).expand(weight.shape)[..., None]


def _device(tensors: Mapping[str, torch.Tensor]) -> torch.device:
    return next(iter(tensors.values())).device
