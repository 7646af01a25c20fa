"""Operands that no tensor of the graph is: copies whose axes lie as a kernel needs them, and small sums.

They are nodes beside the graph (`Facts.make`), of the size of queries or keys and not of scores.
"""

from __future__ import annotations

import functools
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from attncc.ir.affine import linear_in, poly
from attncc.ir.build import ONE, ZERO, mul
from attncc.ir.expr import Const, Expr, Index, Op, free
from attncc.ir.reasons import because
from attncc.patterns.site.reading import Facts, Point, Unreadable

aten = torch.ops.aten


@dataclass(frozen=True)
class Source:
    node: fx.Node
    at: Point


def packed(f: Facts, n: fx.Node, at: Point, extents: Mapping[Expr, Expr], use: int) -> Source:
    """A copy of `n` with one dimension for each index of `at`, where these take indices apart into digits.

    Raises Unreadable where they do something else."""
    n, at = _turned_back(f, n, at, use)
    digits: dict[Index, list[tuple[Expr, int]]] = {}
    for dim in reversed(range(len(at))):
        if isinstance(at[dim], Const):
            n = f.make(aten.select.int, (n, dim, int(at[dim].value)), use)  # type: ignore[attr-defined]
    left = [x for x in at if not isinstance(x, Const)]
    for dim, x in enumerate(left):
        found = _digit(x)
        if found is None:
            raise Unreadable(n, because("operand-layout"))
        digits.setdefault(found[0], []).append((found[1], dim))
    order: list[int] = []
    for index, held in digits.items():
        held.sort(key=lambda digit: _size(digit[0]), reverse=True)
        dims = [dim for _, dim in held]
        if poly(functools.reduce(mul, [f.shape(n)[dim] for dim in dims])) != poly(extents[index]):
            raise Unreadable(n, because("operand-layout"))
        order += dims
    if order != list(range(len(order))):
        n = f.make(aten.permute.default, (n, order), use)
    for dim, held in enumerate(digits.values()):
        if len(held) > 1:
            n = f.make(aten.flatten.using_ints, (n, dim, dim + len(held) - 1), use)
    return Source(n, tuple(digits))


def _turned_back(f: Facts, n: fx.Node, at: Point, use: int) -> tuple[fx.Node, Point]:
    """A copy whose rows are turned round to where they are read, for indices (i + c) % N along dimensions of N."""
    point = list(at)
    for dim, x in enumerate(at):
        if not (isinstance(x, Op) and x.name == "mod" and poly(x.args[1]) == poly(f.shape(n)[dim])):
            continue
        for index in (y for y in free(x.args[0]) if isinstance(y, Index)):
            line = linear_in(x.args[0], index)
            if line is not None and line[0] == {(): 1} and set(line[1]) == {()}:
                n = f.make(aten.roll.default, (n, [-line[1][()]], [dim]), use)
                point[dim] = index
    return n, tuple(point)


def _digit(x: Expr) -> tuple[Index, Expr] | None:
    """(index, divisor) of an index, `index // c`, `index % c` or `index // c % m`."""
    by: Expr = ONE
    if isinstance(x, Op) and x.name == "mod":
        x = x.args[0]
    if isinstance(x, Op) and x.name == "floordiv":
        x, by = x.args
    return (x, by) if isinstance(x, Index) else None


def _size(by: Expr) -> float:
    return float(by.value) if isinstance(by, Const) else float("inf")


def einsum(f: Facts, factors: Sequence[tuple[fx.Node, Point]], out: Sequence[Index], use: int) -> fx.Node | None:
    """The product of tensors read at plain indices, summed over those that are not in `out`. None where an index is no
    plain one, or the tensors are of several types."""
    letters: dict[Expr, str] = {}
    unused = iter(string.ascii_letters)
    terms: list[str] = []
    for n, at in factors:
        term = ""
        for x, extent in zip(at, f.shape(n), strict=True):
            if isinstance(x, Index):
                term += letters.setdefault(x, letters.get(x) or next(unused))
            elif x is ZERO and extent is ONE:
                term += next(unused)  # summed over its one element
            else:
                return None
        terms.append(term)
    if len({f.value(n).dtype for n, _ in factors}) != 1:
        return None
    equation = f"{','.join(terms)}->{''.join(letters[x] for x in out)}"
    return f.make(aten.einsum.default, (equation, [x for x, _ in factors]), use)


def summed(
    f: Facts, factors: Sequence[tuple[fx.Node, Point]], out: Sequence[Index], together: Sequence[Index], joined: Index,
    use: int,
) -> Source | None:  # fmt: skip
    """The product of tensors read at plain indices, over `out` and those that `together` become one index `joined`.

    None where `einsum` makes none."""
    n = einsum(f, factors, (*out, *together), use)
    if n is None:
        return None
    if len(together) > 1:
        n = f.make(aten.flatten.using_ints, (n, -len(together), -1), use)
    return Source(n, (*out, joined))
