"""The interpreter: an attention in plain eager torch, one line an equation. It is the oracle, not a kernel: it makes
every N x M object that kernels avoid."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from attncc.ir.attention import Access, Attention, Axis, S, W
from attncc.ir.evaluate import DTYPE_OF, Evaluator
from attncc.ir.expr import Const, Expr, Load, Size

Result = dict[str, torch.Tensor]


class Sized(Protocol):
    """What declares sizes: every node."""

    @property
    def sizes(self) -> tuple[Size, ...]: ...


def size_table(a: Sized, sizes: Sequence[int]) -> dict[Expr, int]:
    """Values of the declared sizes. Raises ValueError if their number is wrong."""
    if len(sizes) != len(a.sizes):
        raise ValueError(f"the {type(a).__name__.lower()} declares {len(a.sizes)} sizes, got {len(sizes)}")
    return dict(zip(a.sizes, sizes, strict=True))


def extent(x: Const | Size, sizes: Mapping[Expr, int]) -> int:
    return sizes[x] if isinstance(x, Size) else int(x.value)


def interpret(
    a: Attention,
    tensors: Mapping[str, torch.Tensor],
    sizes: Sequence[int] = (),
    *,
    compute: torch.dtype | None = None,
    rounding: bool = False,
) -> Result:
    """Outputs of `a` by name, in `compute` (by default the node's own compute type, then rounded to its dtype).

    Pass `compute=torch.float64` for a reference; nothing is rounded then. Differentiable in its float operands."""
    table = size_table(a, sizes)
    wide = compute or DTYPE_OF[a.compute_dtype]
    axes = a.axes
    grid = index_grid(axes, table, next(iter(tensors.values())).device)
    ev = Evaluator(grid, tensors, wide, rounding=rounding, checked=True)

    def operand(access: Access, last: Axis, row: Axis) -> torch.Tensor:
        """(*batch, row, last) of an operand."""
        value = ev(Load(access.tensor, access.index, "float"))
        shape = [extent(x.extent, table) if x in (*a.batch, row, last) else 1 for x in axes]
        keep = [n for n, x in enumerate(axes) if x in (*a.batch, row, last)]
        return value.expand(shape).reshape([shape[n] for n in keep])

    q, k, v = operand(a.q, a.d, a.i), operand(a.k, a.d, a.j), operand(a.v, a.e, a.j)
    s = q @ k.transpose(-1, -2)
    batch_ij = (*a.batch, a.i, a.j)
    full = tuple(extent(x.extent, table) for x in batch_ij)
    ev.known[S] = s[..., None, None]

    def over_ij(x: Expr) -> torch.Tensor:
        return ev(x)[..., 0, 0].expand(full) if ev(x).ndim else ev(x).expand(full)

    score, visible = over_ij(a.score), over_ij(a.mask)
    sink = None if a.sink is None else over_ij(a.sink)[..., :1]
    w, lse = _normalize(a, score, visible, sink)
    ev.known[W] = w[..., None, None]
    weights = over_ij(a.weight)
    if a.normalizer != "softmax" or a.empty == "zero":
        weights = torch.where(visible, weights, 0.0)
    out = weights @ v
    dtype = wide if compute is not None else DTYPE_OF[a.dtype]
    every = {"out": out.to(dtype), "lse": lse, "weights": weights.to(dtype)}
    return {name: every[name] for name in a.outputs}


_POINTWISE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "none": lambda x: x,
}


def _normalize(
    a: Attention, score: torch.Tensor, visible: torch.Tensor, sink: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and the log of their sum. A row that sees nothing gives zeros, the mean, or NaN, as `a.empty` says."""
    if a.normalizer != "softmax":
        w = _POINTWISE[a.normalizer](score)
        return torch.where(visible, w, 0.0), torch.zeros_like(score[..., 0])
    hidden = score.masked_fill(~visible, float("-inf"))
    logits = hidden if sink is None else torch.cat([hidden, sink], -1)
    empty = ~(visible.any(-1, keepdim=True))
    if sink is not None or a.empty == "nan":
        w = torch.softmax(logits, -1)[..., : score.shape[-1]]
    elif a.empty == "mean":
        w = torch.softmax(torch.where(empty, equal_scores(score, a.slope), hidden), -1)
    else:
        w = torch.where(empty, 0.0, torch.softmax(hidden.masked_fill(empty, 0.0), -1))
    nothing = logits.isneginf().all(-1, keepdim=True)  # the sum of such a row has a gradient of NaN
    return w, torch.logsumexp(logits.masked_fill(nothing, 0.0), -1).masked_fill(nothing[..., 0], float("-inf"))


def equal_scores(score: torch.Tensor, slope: float) -> torch.Tensor:
    """Zeros whose gradients are those of `score` times a slope."""
    if slope == 0:
        return torch.zeros_like(score)
    return (slope * (score - score.detach())).masked_fill(~score.isfinite(), 0.0)


def index_grid(axes: Sequence[Axis], table: Mapping[Expr, int], device: torch.device) -> dict[Expr, torch.Tensor]:
    """Each index as an arange along its own dimension, each size as a scalar."""
    grid: dict[Expr, torch.Tensor] = {
        s: torch.scalar_tensor(n, dtype=torch.int64, device=device) for s, n in table.items()
    }
    for at, axis in enumerate(axes):
        shape = [1] * len(axes)
        shape[at] = -1
        grid[axis.index] = torch.arange(extent(axis.extent, table), device=device).view(shape)
    return grid
