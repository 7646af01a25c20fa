"""Dimensions as operators of attention want them: one for each axis, and one for all heads.

Two axes one after the other in a dimension are taken apart:

    k: f32[B * 8, d, N],  k[b * 8 + h, d, j]      ->      k: f32[B, 8, d, N],  k[b, h, d, j]
    v: f32[B, N, 8 * e],  v[b, j, h * e + e']     ->      v: f32[B, N, 8, e],  v[b, j, h, e']

Heads that share keys, and are an axis of their own, become one with the axis of those keys (`grouped`):

    batch b, g = 2, r = 4   q[b, g, r, i, d], k[b, g, j, d]   ->   batch b, h = 8   q[b, h, i, d], k[b, h // 4, j, d]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from attncc.codegen.onnx.nodes import Extent, Value
from attncc.ir import Access, Attention, Axis, Const, Expr, Size, Tensor
from attncc.ir.affine import plus, poly
from attncc.ir.attention import fresh_name
from attncc.ir.build import add, mul, op
from attncc.ir.expr import Load, loads, mentions


def split_dims(
    a: Attention, tensors: Sequence[Value], sizes: Mapping[Size, Extent]
) -> tuple[Attention, list[Value]]:  # fmt: skip
    """The attention and its tensors with such dimensions split, wherever a tensor is read that way alone."""
    found = list(tensors)
    for at, t in enumerate(a.tensors):
        for dim in reversed(range(len(t.shape))):
            parts = _parts(a, t.name, dim)
            if parts is not None:
                a = _indexed(a, t.name, dim, 1, (parts[0].index, parts[1].index), (parts[0].extent, parts[1].extent))
                value = found[at]
                extents = [x.extent for x in parts]
                wide: list[Extent] = [int(n.value) if isinstance(n, Const) else sizes[n] for n in extents]
                found[at] = value.reshape([*value.shape[:dim], *wide, *value.shape[dim + 1 :]])
    return a, found


def grouped(
    a: Attention, tensors: Sequence[Value], sizes: Mapping[Size, Extent]
) -> tuple[Attention, list[Value]]:  # fmt: skip
    """The attention with one axis for its heads where keys and values mention the first of two alone; their extents are
    known. Other attentions as they are."""
    found = list(tensors)
    if len(a.batch) != 3:
        return a, found
    (_, outer, inner) = a.batch
    known = [n.value for n in (outer.extent, inner.extent) if isinstance(n, Const)]
    shared = not any(mentions(x, inner.index) for access in (a.k, a.v) for x in access.index)
    if not shared or len(known) != 2:
        return a, found
    heads = Axis(fresh_name("h", {x.name for x in (*a.axes, *a.sizes, *a.tensors)}), Const(int(known[0] * known[1])))
    group, within = op("floordiv", heads.index, inner.extent), op("mod", heads.index, inner.extent)
    a = replace(a.substitute({outer.index: group, inner.index: within}), batch=(a.batch[0], heads), layout=())
    for at, t in enumerate(a.tensors):
        for dim in range(len(t.shape) - 1):
            reads = _reads(a, t.name)
            if reads and all(index[dim : dim + 2] == (group, within) for index in reads):
                a = _indexed(a, t.name, dim, 2, (heads.index,), (heads.extent,))
                shape = found[at].shape
                found[at] = found[at].reshape([*shape[:dim], int(known[0] * known[1]), *shape[dim + 2 :]])
    return a, found


def _reads(a: Attention, tensor: str) -> list[tuple[Expr, ...]]:
    every = [x.index for x in (a.q, a.k, a.v) if x.tensor == tensor]
    return every + [x.index for x in loads(*a.expressions()) if x.tensor == tensor]


def _parts(a: Attention, tensor: str, dim: int) -> tuple[Axis, Axis] | None:
    """The two axes that a dimension holds, None where it is read in another way too."""
    read = {index[dim] for index in _reads(a, tensor)}
    if len(read) != 1:
        return None
    (x,) = read
    p, extent = poly(x), poly(a.tensor(tensor).shape[dim])
    for outer in a.axes:
        for inner in a.axes:
            whole = poly(add(mul(outer.index, inner.extent), inner.index))
            if outer is not inner and p == whole and not plus(extent, poly(mul(outer.extent, inner.extent)), -1):
                return outer, inner
    return None


def _indexed(
    a: Attention, tensor: str, dim: int, count: int, own: tuple[Expr, ...], shape: tuple[Const | Size, ...]
) -> Attention:  # fmt: skip
    """The attention with other indices, of other extents, in the place of `count` dimensions of a tensor."""

    def other(index: Sequence[Expr]) -> tuple[Expr, ...]:
        return (*index[:dim], *own, *index[dim + count :])

    def access(x: Access) -> Access:
        return Access(tensor, other(x.index)) if x.tensor == tensor else x

    table: dict[Expr, Expr] = {
        x: Load(tensor, other(x.index), x.kind) for x in loads(*a.expressions()) if x.tensor == tensor
    }  # fmt: skip
    a = a.substitute(table) if table else a
    tensors = tuple(
        Tensor(t.name, t.dtype, (*t.shape[:dim], *shape, *t.shape[dim + count :])) if t.name == tensor else t
        for t in a.tensors
    )
    return replace(a, q=access(a.q), k=access(a.k), v=access(a.v), tensors=tensors)
