"""The portable form of an attention: what any program of torch's own operators can hold, in one traceable piece.

    softmax(scale * s + bias where mask) v   ->   scaled_dot_product_attention, where that computes the same
    anything else                            ->   the equations, every score made

Nothing here depends on data, so the form can be traced with symbolic sizes and exported.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

from attncc.codegen.torch_form import Blocks, Ranges, one_block, operand, operands, whole_ranges
from attncc.ir import Access, Attention, Axis, Expr
from attncc.ir.build import TRUE
from attncc.ir.dense import Dense, dense
from attncc.ir.expr import mentions


def portable(a: Attention, tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
    """The outputs of `a` in the order of `a.outputs`; `tensors` in the order of `a.tensors`, `sizes` of `a.sizes`.

    Makes every score. Nothing is checked: an index outside of its tensor is what torch makes of it."""
    named = {t.name: x for t, x in zip(a.tensors, tensors, strict=True)}
    table = dict(zip(a.sizes, sizes, strict=True))
    whole = whole_ranges(a, table)
    ev = Blocks(a, named, table, whole)
    ev.like = tensors[0]
    form = dense(a)
    if form is not None and not form.cap and form.settled:
        return [_library(a, form, ev, whole)]
    q, k, v = (_operand(ev, a, *x).to(ev.compute) for x in operands(a))
    return one_block(a, table, whole, None, tuple(named), q, k, v, *tensors)


def _library(a: Attention, form: Dense, ev: Blocks, whole: Ranges) -> torch.Tensor:
    batch = [whole[x][1] for x in a.batch]
    q, k, v = (_operand(ev, a, *x) for x in operands(a))
    shared = len(batch) > 1 and batch[-1] != 1 and k.shape[-3] == 1 and v.shape[-3] == 1

    def four(x: torch.Tensor, heads: Sequence[int]) -> torch.Tensor:
        """(batch, heads, .., ..): its fast paths ask for that."""
        x = x.expand(*heads, *x.shape[-2:])
        if x.ndim == 4:
            return x
        return x.reshape(*heads[:1], -1, *x.shape[-2:]) if heads else x[None, None]

    def pairs(x: Expr, dtype: torch.dtype) -> torch.Tensor:
        """(batch, heads, rows, keys), with extent 1 for batch and heads where nothing depends on them."""
        value = ev(x).to(dtype)
        value = value.squeeze((-2, -1)) if value.ndim else value.reshape([1] * (len(batch) + 2))
        value = value.expand(*value.shape[:-2], whole[a.i][1], whole[a.j][1])
        own = _own_axes(a, x)
        if len(batch) <= 1:
            return value.unsqueeze(1) if batch else value[None, None]
        if not own & {*a.batch[1:]}:
            return value[(slice(None), *(0,) * (len(batch) - 1))].unsqueeze(1)
        first = batch[0] if a.batch[0] in own else 1
        value = value.expand(first, *batch[1:], *value.shape[-2:])
        return value if value.ndim == 4 else value.reshape(first, -1, *value.shape[-2:])

    mask = None if form.causal or form.mask is TRUE else pairs(form.mask, torch.bool)
    if form.bias is not None:
        bias = pairs(form.bias, q.dtype)
        mask = bias if mask is None else torch.where(mask, bias, float("-inf"))
    keys = [*batch[:-1], 1] if shared else batch
    out = scaled_dot_product_attention(
        four(q, batch), four(k, keys), four(v, keys), attn_mask=mask, is_causal=form.causal, scale=form.scale,
        enable_gqa=shared,
    )  # fmt: skip
    return out.reshape(*batch, *out.shape[-2:])


def _operand(ev: Blocks, a: Attention, access: Access, row: Axis, last: Axis) -> torch.Tensor:
    """(*batch, row, last) of an operand: where each of its dimensions is an axis, they only change places."""
    axes = [*a.batch, row, last]
    at = {x.index: n for n, x in enumerate(axes)}
    whole = [axes[at[x]].extent if x in at else None for x in access.index]  # type: ignore[index]
    if len({*access.index}) < len(whole) or a.tensor(access.tensor).shape != tuple(whole):
        return operand(ev, a, access, row, last)
    value = ev.tensors[access.tensor].permute([access.index.index(x.index) for x in axes if x.index in access.index])
    for n, x in enumerate(axes):
        if x.index not in access.index:
            value = value.unsqueeze(n)
    return value


def _own_axes(a: Attention, x: Expr) -> set[Axis]:
    return {axis for axis in a.batch if mentions(x, axis.index)}
