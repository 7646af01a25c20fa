"""The sum of weights that a linear attention is divided by, in its spellings.

    (q' . sum_j k'_j) by a product, an einsum, or a sum of elements           a column of ones beside the values
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from attncc.ir.analysis import exact
from attncc.ir.build import ONE, ZERO
from attncc.ir.expr import Const, Expr, Index, Load, Op, loads, rewrite, walk
from attncc.ir.linear import Z
from attncc.patterns.site import (
    DOT,
    ELEMENTS,
    VIEW_OPS,
    Facts,
    Point,
    Reader,
    Unreadable,
    argument,
    broadcast,
    contraction,
    op_name,
)

_STEPS = 8
Operand = tuple[fx.Node, Point]


@dataclass(frozen=True)
class Quotient:
    """`node` is the output divided by `over`, an expression of the sum of weights `z`. It has the first `columns` of
    the product's (one may have held the sum). `at` are its indices, `read` is where it reads the product."""

    node: fx.Node
    over: Expr
    columns: Expr
    at: Point
    read: Point


@dataclass(frozen=True)
class Weighted:
    """What the weights of a linear attention are made of, over the indices of its product `outer` (`out`): operands
    at their points, the indices of channels, keys and value columns; that of the query where it sees the past only."""

    outer: fx.Node
    out: Point
    q: Operand
    k: Operand
    v: Operand
    d: Index
    j: Index
    e: Expr
    extents: dict[Expr, Expr]
    row: Expr | None = None


def divided(f: Facts, w: Weighted) -> Quotient | None:
    """The quotient that the product ends in, if it is one by the sum of its weights."""
    for n in _ends(f, w.outer):
        at = tuple(ZERO if s is ONE else Index(f"n{x}") for x, s in enumerate(f.shape(n)))
        extents = w.extents | {x: s for x, s in zip(at, f.shape(n), strict=True) if x is not ZERO}
        value = value_of(f, (n, at), extents, f.order[n], frozenset({w.outer}))
        top, bottom = _fraction(value)
        if isinstance(top, Load) and top.tensor == w.outer.name and bottom is not None:
            over = _over(f, bottom, top.index, w, extents)
            (column,) = (x for o, x in zip(w.out, top.index, strict=True) if o is w.e)
            if over is not None and column in extents:
                return Quotient(n, over, extents[column], at, top.index)
    return None


def multiplied(f: Facts, w: Weighted, factor: Operand) -> Expr | None:
    """What one over `factor`, with which the product is multiplied, makes of the sum of its weights."""
    value = value_of(f, factor, w.extents, f.order[w.outer])
    if isinstance(value, Op) and value.name == "div" and value.args[0] == Const(1.0):
        return _over(f, value.args[1], w.out, w, w.extents)
    return None


def _over(f: Facts, bottom: Expr, at: Point, w: Weighted, extents: dict[Expr, Expr]) -> Expr | None:
    """`bottom` in terms of the sum of the weights, where it is of nothing else. `at` is where the product is read."""
    sums = [x for x in loads(bottom) if _is_sum(f, x, at, w, extents)]
    if len(sums) != 1:
        return None
    over = rewrite(bottom, lambda x: Z if x is sums[0] else None)
    return None if any(isinstance(x, Load | Index) for x in walk(over)) else over


def _ends(f: Facts, n: fx.Node) -> list[fx.Node]:
    """Quotients and products that `n`, moved, cast or sliced, goes into."""
    found: list[fx.Node] = []
    stack, seen = [(n, 0)], {n}
    while stack:
        x, steps = stack.pop(0)
        for user in x.users:
            if user in seen or user not in f.live or steps > _STEPS or not f.is_tensor(user):
                continue
            seen.add(user)
            if op_name(user).rstrip("_") in ("div", "mul", "true_divide"):
                found.append(user)
            elif user.target in VIEW_OPS or user.target in ELEMENTS:
                stack.append((user, steps + 1))
    return found


def _fraction(x: Expr | None) -> tuple[Expr | None, Expr | None]:
    """(a, b) of a / b or a * (1 / b)."""
    if isinstance(x, Op) and x.name == "div":
        return x.args[0], x.args[1]
    if isinstance(x, Op) and x.name == "mul":
        for a, b in (x.args, tuple(reversed(x.args))):
            if isinstance(b, Op) and b.name == "div" and isinstance(b.args[0], Const) and b.args[0].value == 1.0:
                return a, b.args[1]
    return None, None


def _is_sum(f: Facts, x: Load, at: Point, w: Weighted, extents: dict[Expr, Expr]) -> bool:
    """Whether a load is the sum of the weights of the row that is read at `at`."""
    if x.tensor == w.outer.name:  # a column of the product itself: its values must be ones
        columns = [c for o, c in zip(w.out, x.index, strict=True) if o is w.e]
        same = all(a is c for o, a, c in zip(w.out, at, x.index, strict=True) if o is not w.e)
        ones = tuple(rewrite(y, lambda z: columns[0] if z is w.e else None) for y in w.v[1])
        return same and len(columns) == 1 and value_of(f, (w.v[0], ones), extents, f.order[w.outer]) == Const(1.0)
    there: dict[Expr, Expr] = {o: a for o, a in zip(w.out, at, strict=True) if isinstance(o, Index)}

    def moved(operand: Operand) -> Operand:
        return operand[0], tuple(rewrite(y, there.get) for y in operand[1])

    when = f.order[w.outer]
    return any(
        same_value(f, one, moved(w.q), extents, when)
        and _is_key_sum(f, other, moved(w.k), w.j, extents, None if w.row is None else rewrite(w.row, there.get))
        for one, other in factors(f, x, w.d)
    )


def factors(f: Facts, x: Load, d: Index) -> list[tuple[Operand, Operand]]:
    """Both orders of the factors of sum_d a * b, as a product or written element by element."""
    if x.tensor.startswith(DOT):
        product = contraction(f, f.by_name[x.tensor.removeprefix(DOT)])
        assert product is not None
        left, right = product.maps(x.index, d)
        a, b = (product.lhs, left), (product.rhs, right)
        return [(a, b), (b, a)]
    summed = _sum_over(f, f.by_name[x.tensor], x.index, d)
    if summed is None or op_name(summed[0]) != "mul":
        return []
    factors = [n for n in summed[0].args if isinstance(n, fx.Node) and f.is_tensor(n)]
    if len(factors) != 2:
        return []
    a, b = ((n, broadcast(f, n, summed[1])) for n in factors)
    return [(a, b), (b, a)]


def value_of(
    f: Facts, x: Operand, extents: dict[Expr, Expr], when: int, leaves: frozenset[fx.Node] = frozenset()
) -> Expr | None:
    try:
        return exact(Reader(f, when, extents, leaves).value_at(x[0], x[1], when))
    except Unreadable:
        return None


def same_value(f: Facts, a: Operand, b: Operand, extents: dict[Expr, Expr], when: int) -> bool:
    return a == b or value_of(f, a, extents, when) is value_of(f, b, extents, when) is not None


def _is_key_sum(f: Facts, x: Operand, k: Operand, j: Index, extents: dict[Expr, Expr], row: Expr | None) -> bool:
    """Whether an operand is the keys summed over all of them, or over those up to a row."""
    value = value_of(f, x, extents, f.order[x[0]] + 1)
    if not isinstance(value, Load):
        return False
    node = f.by_name[value.tensor.removeprefix(DOT)]  # keys under a mask, summed, are a product of the two
    summed = _sum_over(f, node, value.index, j) if row is None else _sum_up_to(f, node, value.index, j, row)
    return summed is not None and same_value(f, summed, k, extents, f.order[node])


def _sum_over(f: Facts, n: fx.Node, at: Point, index: Index) -> Operand | None:
    """(what is summed, its point) where `n` is a sum over one dimension, which `index` then runs over."""
    if op_name(n) != "sum" or len(n.args) < 2:
        return None
    source, dims = n.args[0], n.args[1]
    dims = [dims] if isinstance(dims, int) else dims
    if not isinstance(source, fx.Node) or not isinstance(dims, list | tuple) or len(dims) != 1:
        return None
    (dim,) = dims
    assert isinstance(dim, int)
    dim %= f.rank(source)
    kept = bool(n.args[2]) if len(n.args) > 2 else bool(n.kwargs.get("keepdim", False))
    return source, (*at[:dim], index, *at[dim + kept :])


def _sum_up_to(f: Facts, n: fx.Node, at: Point, index: Index, row: Expr) -> Operand | None:
    """The same for a running sum that is read at a row."""
    source: Any = n.args[0] if op_name(n) == "cumsum" else None
    dim = 0 if source is None else argument(n, "dim") % f.rank(n)
    return None if source is None or at[dim] is not row else (source, (*at[:dim], index, *at[dim + 1 :]))
