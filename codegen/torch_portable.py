"""The portable form of an attention: what any program of torch's own operators can hold, in one traceable piece.

    softmax(scale * s + bias where mask) v   ->   scaled_dot_product_attention, where that computes the same
    anything else                            ->   the equations, every score made

Nothing here depends on data, so the form can be traced with symbolic sizes and exported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from attncc.codegen.torch_form import Blocks, Ranges, is_plain, one_block, operand, operands, whole_ranges
from attncc.ir import Access, Attention, Axis, Expr, S, W
from attncc.ir.analysis import scaled
from attncc.ir.build import TRUE, add, const, op
from attncc.ir.expr import Op, mentions, substitute


@dataclass(frozen=True)
class Dense:
    """An attention that scaled_dot_product_attention computes: `scale * s + bias`, visible where `mask`. `causal` says
    that the mask is j <= i."""

    scale: float
    bias: Expr | None
    mask: Expr
    causal: bool


def dense(a: Attention) -> Dense | None:
    """How scaled_dot_product_attention computes `a`, None where it does not: where it has another normalizer, a sink,
    a score that is no sum of s and something else, or rows that see nothing and do not give zero."""
    dtypes = {a.tensor(x.tensor).dtype for x in (a.q, a.k, a.v)} | {a.dtype}
    if a.normalizer != "softmax" or a.sink is not None or a.weight is not W or a.outputs != ("out",) or len(dtypes) > 1:
        return None
    terms = _terms(a.score)
    own = [x for x in terms if mentions(x, S)]
    if len(own) != 1 or scaled(own[0])[0] is not S:
        return None
    bias: Expr | None = None
    for x in terms:
        if x is not own[0]:
            bias = x if bias is None else add(bias, x)
    if a.empty != "zero" and not sees_a_key(a):
        return None
    if bias is not None and a.mask is not TRUE and not sees_a_key(a):
        return None  # a row of -inf alone: what that gives differs between its kernels
    return Dense(scaled(own[0])[1], bias, a.mask, is_plain(a) and a.mask is not TRUE)


def _terms(x: Expr) -> tuple[Expr, ...]:
    """The terms of a sum, left to right."""
    match x:
        case Op("add", (left, right)):
            return (*_terms(left), *_terms(right))
        case Op("sub", (left, right)):
            return (*_terms(left), *(op("neg", t) for t in _terms(right)))
        case _:
            return (x,)


def sees_a_key(a: Attention) -> bool:
    """Whether each row sees a key for certain: its own, the first one, or any."""
    own = a.i.extent == a.j.extent and substitute(a.mask, {a.j.index: a.i.index}) is TRUE
    return a.mask is TRUE or own or substitute(a.mask, {a.j.index: const(0)}) is TRUE or is_plain(a)


def portable(a: Attention, tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
    """The outputs of `a` in the order of `a.outputs`; `tensors` in the order of `a.tensors`, `sizes` of `a.sizes`.

    Makes every score. Nothing is checked: an index outside of its tensor is what torch makes of it."""
    named = {t.name: x for t, x in zip(a.tensors, tensors, strict=True)}
    table = dict(zip(a.sizes, sizes, strict=True))
    whole = whole_ranges(a, table)
    ev = Blocks(a, named, table, whole)
    ev.like = tensors[0]
    form = dense(a)
    if form is not None:
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
