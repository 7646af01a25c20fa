"""The gradient of an attention: what its backward computes, from what its forward kept.

    p[i, j]  = exp(score - lse[i]) where mask             the weights again, from the sums of the rows
    t[i, j]  = p (weight' (g[i] . v[j]) - delta[i])       delta[i] = g[i] . out[i] - dlse[i]
    dq[i]    = sum_j score' t k[j]                        dk[j] = sum_i score' t q[i]
    dv[j]    = sum_i weight' p g[i]                       dload = sum_ij (d score / d load) t

g is the gradient of the output and `weight' = d weight / d w`, the weight being linear in w. Gradients of loads are
summed along the load's own index structure: over all pairs, for each row, for each key, or for each distance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

import torch

from attncc.ir.attention import Access, Attention, Axis, S, Tensor, fresh_name
from attncc.ir.evaluate import DTYPE_OF, Evaluator
from attncc.ir.expr import Expr, Load, mentions
from attncc.ir.interpret import extent, index_grid, size_table

#: What the gradient of a load is kept apart by: nothing (one number a batch point), the row, the key, how far they are
#: apart, or both.
Over = Literal["", "i", "j", "j - i", "i, j"]
OVERS: tuple[str, ...] = get_args(Over)
#: What a backward is given beside the tensors of its attention, in this order.
GIVEN = ("grad_out", "out", "lse", "grad_lse")


@dataclass(frozen=True)
class LoadGrad:
    """One load of the score: `slope` is d score / d load."""

    load: Load
    slope: Expr
    over: Over


@dataclass(frozen=True)
class AttentionGrad:
    """`operands` are those of "q", "k" and "v" whose gradients are wanted. `by_score` is d score / d s, `by_weight`
    d weight / d w; both are over what score and weight are over."""

    attention: Attention
    operands: tuple[str, ...]
    by_score: Expr
    by_weight: Expr
    loads: tuple[LoadGrad, ...] = ()

    @cached_property
    def by_key(self) -> Attention:
        """The attention seen from its keys: keys are its rows, queries its keys, and the output's gradient its values.
        Its loop bounds are the queries that a tile of keys is seen by; its tensors are those that a backward takes."""
        a = self.attention
        taken = {t.name for t in a.tensors} | {x.name for x in a.axes} | {s.name for s in a.sizes}
        rows = tuple(x.extent for x in (*a.batch, a.i))
        grad, out, lse, grad_lse = (fresh_name(n, taken) for n in GIVEN)
        given = (
            Tensor(grad, a.dtype, (*rows, a.e.extent)), Tensor(out, a.dtype, (*rows, a.e.extent)),
            Tensor(lse, a.compute_dtype, rows), Tensor(grad_lse, a.compute_dtype, rows),
        )  # fmt: skip
        values = Access(grad, tuple(x.index for x in a.out_axes))
        return replace(
            a, i=a.j, j=a.i, q=a.k, k=a.q, v=values, tensors=(*a.tensors, *given), sink=None, drop=None, empty="zero",
            outputs=("out",), layout=(),
        )  # fmt: skip

    @cached_property
    def held(self) -> tuple[Axis, ...]:
        """The batch axes that keys or values depend on: over the others their gradients are summed."""
        a = self.attention
        return tuple(x for x in a.batch if any(mentions(n, x.index) for n in (*a.k.index, *a.v.index)))


def shapes_of_grad(g: AttentionGrad, sizes: Sequence[int]) -> list[list[int]]:
    """The shapes of what a backward gives. Sums of loads have the axes of the batch and what they are kept apart by;
    distances, key - row, count from the lowest, 1 - rows."""
    a = g.attention
    table = size_table(a, sizes)
    rows, keys, d, e = (extent(x.extent, table) for x in (a.i, a.j, a.d, a.e))
    batch, held = ([extent(x.extent, table) for x in axes] for axes in (a.batch, g.held))
    operands = {"q": [*batch, rows, d], "k": [*held, keys, d], "v": [*held, keys, e]}
    apart: dict[Over, list[int]] = {"": [], "i": [rows], "j": [keys], "j - i": [rows + keys - 1], "i, j": [rows, keys]}
    return [*(operands[n] for n in g.operands), *([*batch, *apart[x.over]] for x in g.loads)]


Ranges = Mapping[Axis, tuple[int, int]]


def interpret_grad(
    g: AttentionGrad, tensors: Mapping[str, torch.Tensor], given: Sequence[torch.Tensor], sizes: Sequence[int], *,
    compute: torch.dtype | None = None, ranges: Ranges | None = None,
) -> list[torch.Tensor]:  # fmt: skip
    """What the gradient means, in plain torch: the gradients of the wanted operands, q as (*batch, i, d), k and v as
    (*held, j, d or e), then the sums of each load. `given` are those that `GIVEN` names. Makes N x M objects.

    `ranges` are the parts of axes that are looked at, all of those that it does not name: what is summed over an axis
    is summed over its part."""
    a = g.attention
    table = size_table(a, sizes)
    wide = compute or DTYPE_OF[a.compute_dtype]
    axes = a.axes
    span = {x: (0, extent(x.extent, table)) for x in axes} | dict(ranges or {})
    leaves = index_grid((), table, given[0].device)
    for at, x in enumerate(axes):
        grid = torch.arange(*span[x], device=given[0].device)
        leaves[x.index] = grid.view([-1 if n == at else 1 for n in range(len(axes))])
    ev = Evaluator(leaves, tensors, wide, checked=True)

    def operand(access: Access, last: Axis, row: Axis) -> torch.Tensor:
        value = ev(Load(access.tensor, access.index, "float"))
        kept = [n for n, x in enumerate(axes) if x in (*a.batch, row, last)]
        shape = [length(x) if n in kept else 1 for n, x in enumerate(axes)]
        return value.expand(shape).reshape([shape[n] for n in kept])

    def length(x: Axis) -> int:
        return span[x][1] - span[x][0]

    full = [length(x) for x in (*a.batch, a.i, a.j)]

    def over_ij(x: Expr) -> torch.Tensor:
        value = ev(x)
        return (value[..., 0, 0] if value.ndim else value).expand(full)

    q, k, v = operand(a.q, a.d, a.i), operand(a.k, a.d, a.j), operand(a.v, a.e, a.j)
    cut = tuple(slice(*span[x]) for x in (*a.batch, a.i))
    grad, out, lse, grad_lse = (x[cut].to(wide) for x in given)
    ev.known[S] = (q @ k.mT)[..., None, None]
    lse = lse.masked_fill(lse == float("-inf"), float("inf"))
    visible = over_ij(a.mask)
    p = torch.where(visible, (over_ij(a.score) - lse[..., None]).exp(), 0.0)
    delta = (grad * out).sum(-1) - grad_lse
    by_weight = over_ij(g.by_weight)
    t = p * (by_weight * (grad @ v.mT) - delta[..., None])
    ds = torch.where(visible, t * over_ij(g.by_score), 0.0)
    shared = [n for n, x in enumerate(a.batch) if x not in g.held]

    def over_held(x: torch.Tensor) -> torch.Tensor:
        return x.sum(shared) if shared else x

    found: dict[str, torch.Tensor] = {"q": ds @ k, "k": over_held(ds.mT @ q), "v": over_held((p * by_weight).mT @ grad)}
    result = [found[n] for n in g.operands]
    for x in g.loads:
        terms = torch.where(visible, t * over_ij(x.slope), 0.0)
        result.append(_summed(terms, x.over))
    return result


def _summed(terms: torch.Tensor, over: Over) -> torch.Tensor:
    if over == "j - i":
        rows, keys = terms.shape[-2:]
        at = [torch.arange(n, device=terms.device) for n in (rows, keys)]
        place = at[1] - at[0][:, None] + rows - 1
        flat = terms.flatten(-2)
        return flat.new_zeros(*flat.shape[:-1], rows + keys - 1).index_add(-1, place.flatten(), flat)
    return {"": terms.sum((-2, -1)), "i": terms.sum(-1), "j": terms.sum(-2), "i, j": terms}[over]


def print_grad(g: AttentionGrad) -> list[str]:
    """Lines that say what a gradient is of, for the head of a kernel."""
    lines = [f"operands {', '.join(g.operands)}", f"by s     {g.by_score!r}", f"by w     {g.by_weight!r}"]
    return [*lines, *(f"load     {x.load!r}: {x.slope!r}, for each {x.over or 'batch point'}" for x in g.loads)]
