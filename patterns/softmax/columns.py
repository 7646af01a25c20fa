"""Columns of the weights that are read by their numbers: a product with values that are one at one key each.

    w[.., i, at[e]]  =  sum_j w[.., i, j] * v[e, j],   v[e, j] = (j == at[e])

So the columns that somebody wants come out of a kernel whose weights never exist.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from attncc.ir.expr import Const, Expr
from attncc.patterns.site import Contraction, Facts, Point, argument, op_name

aten = torch.ops.aten
#: Columns that are written as numbers in the model: each is an operation beside the graph.
_MOST_NUMBERS = 64


def chosen_columns(f: Facts, n: fx.Node) -> Contraction | None:
    """`n` as the product of what it picks the last dimension of with values of zeros and ones; None where it picks
    none, or another dimension, or by numbers that are not in one row."""
    found = _picked(f, n)
    if found is None:
        return None
    source, at = found
    extent = f.shape(source)[-1]
    if not isinstance(extent, Const) or f.rank(source) < 2 or not f.dtype(source).is_floating_point:
        return None
    key = "columns", n
    if key not in f.answers:
        f.answers[key] = _ones(f, at, int(extent.value), source, n)
    ones = f.answers[key]
    if not isinstance(ones, fx.Node):
        return None

    def maps(point: Point, c: Expr) -> tuple[Point, Point]:
        return (*point[:-1], c), (point[-1], c)

    return Contraction(n, source, ones, extent, maps)


def _picked(f: Facts, n: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(tensor, numbers along its last dimension)"""
    source: Any = n.args[0] if n.op == "call_function" and n.args else None
    if not isinstance(source, fx.Node) or not f.is_tensor(source):
        return None
    last = f.rank(source) - 1
    if op_name(n) == "index":
        numbers: Any = n.args[1]
        if len(numbers) != last + 1 or any(x is not None for x in numbers[:-1]):
            return None
        at = numbers[-1]
    elif op_name(n) == "index_select" and argument(n, "dim") in (-1, last):
        at = argument(n, "index")
    else:
        return None
    plain = isinstance(at, fx.Node) and f.rank(at) == 1 and f.dtype(at) in (torch.int64, torch.int32)
    return (source, at) if plain else None


def _ones(f: Facts, at: fx.Node, keys: int, like: fx.Node, use: fx.Node) -> fx.Node | None:
    """(columns, keys); numbers that count from the end do so here too. None where they are a constant of the trace that
    is too long, or no tensor of the graph lies where they must."""
    when, held = f.order[use], at
    while op_name(held) in ("lift_fresh", "lift_fresh_copy"):
        held = held.all_input_nodes[0]
    fixed = getattr(f.graph.owning_module, str(held.target), None) if held.op == "get_attr" else None
    if fixed is None:
        base = f.make(aten.remainder.Scalar, (at, keys), when)
    else:  # written as numbers, which the model's own graph has no node for
        device = f.value(like).device
        given = (n for n in f.nodes if n.op == "placeholder" and f.is_tensor(n) and f.value(n).device == device)
        base = next(given, None)
    if base is None or (fixed is not None and fixed.numel() > _MOST_NUMBERS):
        return None
    # as `arange` would not lie where the numbers do
    ones = f.make(aten.new_ones.default, (base, [keys]), when, dtype=torch.int64)
    number = f.make(aten.sub.Tensor, (f.make(aten.cumsum.default, (ones, 0), when), 1), when)
    if fixed is None:
        equal = f.make(aten.eq.Tensor, (f.make(aten.unsqueeze.default, (base, -1), when), number), when)
    else:
        each = [f.make(aten.eq.Scalar, (number, int(x) % keys), when) for x in fixed.tolist()]
        equal = f.make(aten.stack.default, (each,), when)
    return f.make(aten.to.dtype, (equal, f.dtype(like)), when)
