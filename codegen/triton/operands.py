"""Operands as a pointer and one stride an axis.

The driver promises operand indices that are affine in the axis indices, so `tensor[index]` lies at
base + sum over axes of index * stride, and each of these strides is an expression over the tensor's own strides.
Strides are leaves of the IR here (`Size`), so they are printed, shared and hoisted like everything else.
"""

from __future__ import annotations

from dataclasses import dataclass

from attncc.ir import Access, Attention, Axis, Const, Expr, Size
from attncc.ir.affine import expr as from_poly
from attncc.ir.affine import linear_in, poly
from attncc.ir.build import ZERO, add, mul
from attncc.ir.expr import Index, free


def stride(tensor: str, dim: int) -> Size:
    """The stride of a dimension, in elements, as a leaf of expressions. No declared size has a dot in its name."""
    return Size(f"{tensor}.{dim}")


@dataclass(frozen=True)
class Operand:
    """`strides` by axis name (an axis that is missing has stride 0), `base` the offset of the origin, in elements."""

    tensor: str
    strides: dict[str, Expr]
    base: Expr

    def along(self, axis: Axis) -> Expr:
        return self.strides.get(axis.name, ZERO)


def operand(access: Access, axes: tuple[Axis, ...]) -> Operand | None:
    """The operand of an access, or None if an index is not affine in the axes."""
    base: Expr = ZERO
    strides: dict[str, Expr] = {}
    for dim, index in enumerate(access.index):
        step = stride(access.tensor, dim)
        rest = index
        for axis in axes:
            split = linear_in(rest, axis.index)
            if split is None:
                return None
            factor, rest = from_poly(split[0]), from_poly(split[1])
            if any(isinstance(x, Index) for x in free(factor)):
                return None
            if factor is not ZERO:
                strides[axis.name] = add(strides.get(axis.name, ZERO), mul(factor, step))
        if any(not isinstance(x, Size) for m in poly(rest) for x in m):
            return None
        base = add(base, mul(rest, step))
    return Operand(access.tensor, strides, base)


def operands(a: Attention) -> tuple[Operand, Operand, Operand] | None:
    q, k, v = (operand(x, a.axes) for x in (a.q, a.k, a.v))
    return (q, k, v) if q is not None and k is not None and v is not None else None


def chunks(extent: int) -> tuple[tuple[int, int], ...]:
    """A head size as (width, offset) of one or two powers of two: 128 is one, 192 is 128 + 64, 80 is 64 + 16.

    Two products with little padding cost less than one padded to the next power of two."""
    whole = max(16, 1 << max(extent - 1, 0).bit_length())
    first = whole // 2
    rest = max(16, 1 << max(extent - first - 1, 0).bit_length())
    if extent > 64 and rest <= first // 2:
        return (first, 0), (rest, first)
    return ((whole, 0),)


def head_sizes(a: Attention) -> tuple[int, int] | None:
    """(d, e) where both are constants."""
    d, e = a.d.extent, a.e.extent
    return (int(d.value), int(e.value)) if isinstance(d, Const) and isinstance(e, Const) else None
