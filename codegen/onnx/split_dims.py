"""Dimensions that hold two axes one after the other, taken apart: operators of attention want a dimension for each.

    k: f32[B * 8, d, N],  k[b * 8 + h, d, j]      ->      k: f32[B, 8, d, N],  k[b, h, d, j]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from attncc.codegen.onnx.nodes import Extent, Value
from attncc.ir import Access, Attention, Axis, Const, Expr, Index, Size, Tensor
from attncc.ir.affine import plus, poly
from attncc.ir.build import add, mul
from attncc.ir.expr import Load, loads


def split_dims(
    a: Attention, tensors: Sequence[Value], sizes: Mapping[Size, Extent]
) -> tuple[Attention, list[Value]]:  # fmt: skip
    """The attention and its tensors with such dimensions split, wherever a tensor is read that way alone."""
    found = list(tensors)
    for at, t in enumerate(a.tensors):
        for dim in reversed(range(len(t.shape))):
            parts = _parts(a, t.name, dim)
            if parts is not None:
                a = _split(a, t.name, dim, parts)
                value = found[at]
                extents = [x.extent for x in parts]
                wide: list[Extent] = [int(n.value) if isinstance(n, Const) else sizes[n] for n in extents]
                found[at] = value.reshape([*value.shape[:dim], *wide, *value.shape[dim + 1 :]])
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
    for outer in a.batch:
        for inner in a.batch:
            whole = poly(add(mul(outer.index, inner.extent), inner.index))
            if outer is not inner and p == whole and not plus(extent, poly(mul(outer.extent, inner.extent)), -1):
                return outer, inner
    return None


def _split(a: Attention, tensor: str, dim: int, parts: tuple[Axis, Axis]) -> Attention:
    def apart(index: Sequence[Expr]) -> tuple[Expr, ...]:
        own: tuple[Index, Index] = parts[0].index, parts[1].index
        return (*index[:dim], *own, *index[dim + 1 :])

    def access(x: Access) -> Access:
        return Access(tensor, apart(x.index)) if x.tensor == tensor else x

    table: dict[Expr, Expr] = {
        x: Load(tensor, apart(x.index), x.kind) for x in loads(*a.expressions()) if x.tensor == tensor
    }  # fmt: skip
    a = a.substitute(table) if table else a
    shapes = tuple(
        Tensor(t.name, t.dtype, (*t.shape[:dim], *(x.extent for x in parts), *t.shape[dim + 1 :]))
        if t.name == tensor else t for t in a.tensors
    )  # fmt: skip
    return replace(a, q=access(a.q), k=access(a.k), v=access(a.v), tensors=shapes)
