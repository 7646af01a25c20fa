"""Where an operand lies: a stride for each of its two loop axes, and an offset for each batch point."""

from __future__ import annotations

from dataclasses import dataclass

from attncc.ir import Access, Axis, Expr, Load, Op
from attncc.ir.affine import expr, linear_in
from attncc.ir.expr import walk


@dataclass(frozen=True)
class Operand:
    """Element (row, col) of a batch point is at `offset + row * row_stride + col * col_stride`.

    `offset` has one expression a tensor dim; strides are sums of (coefficient expression, dim)."""

    tensor: str
    offset: tuple[Expr, ...]
    row_terms: tuple[tuple[Expr, int], ...]
    col_terms: tuple[tuple[Expr, int], ...]


class NotAffine(ValueError):
    """An operand's index is no sum of multiples of its loop axes; the message says which."""


def operand(access: Access, row: Axis, col: Axis) -> Operand:
    """Raises NotAffine where `row` or `col` sits under a floor, a modulus or a load."""
    offset = list[Expr]()
    terms: dict[Axis, list[tuple[Expr, int]]] = {row: [], col: []}
    for dim, x in enumerate(access.index):
        rest = x
        for axis in (row, col):
            split = linear_in(rest, axis.index)
            if split is None or not all(_constant(c) for c in split[0]):
                raise NotAffine(f"{access.tensor}[...] is indexed by {x!r}, which is not affine in {axis.name}")
            if split[0]:
                terms[axis].append((expr(split[0]), dim))
            rest = expr(split[1])
        offset.append(rest)
    return Operand(access.tensor, tuple(offset), tuple(terms[row]), tuple(terms[col]))


def _constant(monomial: tuple[Expr, ...]) -> bool:
    opaque = ("floordiv", "mod")
    return not any(isinstance(n, Load) or (isinstance(n, Op) and n.name in opaque) for n in walk(*monomial))
