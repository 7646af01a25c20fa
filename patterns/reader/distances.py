"""Squared Euclidean distances as what a product of queries and keys gives:

    sum_d (q[i, d] - k[j, d])^2  =  |q - m|^2 + |k - m|^2 - 2 (q - m) . (k - m)

The mean m of the keys is taken from both sides, which changes no distance: what cancels is then no larger than the
points lie apart. Both sides are made in the graph, in float32 at least, and so are the squares of their lengths.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from attncc.ir.build import ONE, add, const, gt, maximum, mul, op, sub, where
from attncc.ir.expr import Const, Expr, Index
from attncc.patterns.reader.rules import Facts, Point, Values, argument, op_name
from attncc.patterns.reader.sums_of_products import broadcasts, written_out
from attncc.patterns.reader.view_ops import broadcast

aten: Any = torch.ops.aten
#: Points a side, above which torch takes distances by a product itself.
_MATMUL_FROM = 25


def of_sum(r: Values, n: fx.Node, at: Point) -> Expr | None:
    """A sum, or a mean, of squared differences."""
    f = r.facts
    w = written_out(f, n)
    if w is None or not w.squared:
        return None
    rank = f.rank(w.source)
    point = tuple(Index(f"x{d}") for d in range(rank))
    if not all(broadcasts(f, x, point) for x in w.factors):
        return None
    a, b = w.factors
    kept = at if w.kept else (*at[: w.dim], const(0), *at[w.dim :])
    return mul(_squared(r, n, a.node, b.node, w.dim - rank, kept), const(w.scale))


def of_points(r: Values, n: fx.Node, at: Point) -> Expr | None:
    """`cdist`, where its results are squared afterwards or torch gets them by a product too: a root makes more of what
    is lost near zero."""
    f = r.facts
    a: Any = n.args[0]
    b: Any = n.args[1]
    mode: Any = argument(n, "compute_mode")
    many = any(isinstance(s, Const) and s.value > _MATMUL_FROM for s in (f.shape(a)[-2], f.shape(b)[-2]))
    product = mode == 1 or (mode in (None, 0) and many)
    if argument(n, "p") != 2 or not (product or all(_is_square(u) for u in n.users)):
        return None
    rows, keys = _made(f, n, "rows", aten.unsqueeze.default, a, -2), _made(f, n, "keys", aten.unsqueeze.default, b, -3)
    square, zero = _squared(r, n, rows, keys, -1, (*at, const(0))), const(0.0)
    if not r.followed(n):
        return op("sqrt", square)
    apart = gt(square, zero)  # points that coincide have no gradient, and a root of zero an infinite one
    return where(apart, op("sqrt", where(apart, square, const(1.0))), zero)


def _is_square(n: fx.Node) -> bool:
    name = op_name(n)
    if name == "pow":
        return isinstance(n.args[1], int | float) and n.args[1] == 2
    return name == "square" or (name == "mul" and n.args[0] is n.args[1])


def _squared(r: Values, n: fx.Node, a: fx.Node, b: fx.Node, dim: int, at: Point) -> Expr:
    """The squared distance, over `dim` (from the end), of what two tensors that broadcast to each other hold `at`."""
    f = r.facts

    def made(name: str, target: Any, *args: Any) -> fx.Node:
        return _made(f, n, name, target, *args)

    wide = torch.float64 if torch.float64 in (f.dtype(a), f.dtype(b)) else torch.float32
    left, right = (
        x if f.dtype(x) == wide else made(f"wide {side}", aten.to.dtype, x, wide) for side, x in enumerate((a, b))
    )
    over = _of_keys(f, left, right)
    if over:
        mean = made("mean", aten.mean.dim, right, over, True)
        left, right = made("left", aten.sub.Tensor, left, mean), made("right", aten.sub.Tensor, right, mean)
    lengths: list[Expr] = []
    for side, x in enumerate((left, right)):
        square = made(f"square {side}", aten.mul.Tensor, x, x)
        length = made(f"length {side}", aten.sum.dim_IntList, square, [dim], True)
        lengths.append(r.load(length, broadcast(f, length, at)))
    both = made("product", aten.mul.Tensor, left, right)
    product = made("products", aten.sum.dim_IntList, both, [dim], True)
    inner = r.value_at(product, broadcast(f, product, at), f.order[n])
    return maximum(sub(add(*lengths), mul(inner, const(2.0))), const(0.0))


def _of_keys(f: Facts, a: fx.Node, b: fx.Node) -> list[int]:
    """The dimensions, from the end, that `b` has and `a` has not."""
    rank = max(f.rank(a), f.rank(b))
    shapes = zip(*((*([ONE] * (rank - f.rank(x))), *f.shape(x)) for x in (a, b)), strict=True)
    return [d - rank for d, (x, y) in enumerate(shapes) if x is ONE and y is not ONE]


def _made(f: Facts, n: fx.Node, name: str, target: Any, *args: Any) -> fx.Node:
    """A node made for the distances that `n` holds, once."""
    return f.make_once(("distance", n, name), lambda: f.make(target, args, f.order[n]))
