"""Attention that is normalised after the product with the values: (exp(x) @ v) / sum(exp(x)), (f(s) @ v) / sum(f(s)).

The quotient takes the place of the product: it reads the product and the sum at the same row, and both sum over the
same exponentials, or over the same function of scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import fx

from attncc.ir.attention import W
from attncc.ir.build import ONE, ZERO
from attncc.ir.expr import ROUNDINGS, Const, Expr, Index, Load, Op
from attncc.patterns.site import (
    DOT,
    ELEMENTS,
    EXPS,
    VIEW_OPS,
    SUMS,
    Facts,
    Frame,
    Reader,
    Unreadable,
    argument,
    compares,
    contraction,
    exponent,
    framed,
    one_dim,
    reduction,
    skip_casts,
)
from attncc.patterns.softmax.anchors import DIVISIONS, Anchor, Denominator, denominator, without_maximum
from attncc.patterns.softmax.sums_of_softmaxes import Term


def divided(f: Facts) -> Iterator[tuple[Frame, Term, fx.Node]]:
    """Quotients of a product by the sum of its weights, and that sum."""
    for n in f.graph.nodes:
        found = _sum_below(f, n.args[1]) if n.target in DIVISIONS and n in f.live else None
        if found is None:
            continue
        try:
            site = _quotient(f, n, *found)
        except Unreadable:
            continue
        if site is not None:
            yield (*site, found[0])


def _sum_below(f: Facts, n: Any) -> tuple[fx.Node, fx.Node, int, fx.Node, Denominator | None] | None:
    """(sum, what it sums, along which dimension, the weights) where a denominator is made of one sum alone, or has an
    exponential of each row beside it, which the last says."""
    while isinstance(n, fx.Node) and f.is_tensor(n) and n.op == "call_function":
        if n.target in SUMS:
            of: Any = n.args[0]
            dim, exps = one_dim(f, of, argument(n, "dim")), skip_casts(of)
            if dim is None or exps is None or not (exps.target in EXPS or compares(f, exps)):
                return None
            return n, of, dim, exps, None
        inputs = [a for a in n.all_input_nodes if f.is_tensor(a)]
        if len(inputs) == 2:
            return _beside(f, n, inputs)
        if len(inputs) != 1 or not (n.target in VIEW_OPS or n.target in ELEMENTS):
            return None
        n = inputs[0]
    return None


def _beside(
    f: Facts, n: fx.Node, inputs: list[fx.Node]
) -> tuple[fx.Node, fx.Node, int, fx.Node, Denominator | None] | None:  # fmt: skip
    """The same of a sum of exponentials and one more."""
    for side in inputs:
        reduced = reduction(f, side, SUMS)
        exps = None if reduced is None else skip_casts(reduced[1])
        power = None if exps is None else exponent(exps)
        found = None if power is None else denominator(f, n, *power)
        if found is not None and exps is not None:
            return found.total, found.of, found.dim, exps, found
    return None


def _quotient(
    f: Facts, n: fx.Node, total: fx.Node, of: fx.Node, dim: int, exps: fx.Node, beside: Denominator | None
) -> tuple[Frame, Term] | None:  # fmt: skip
    shape = f.shape(n)
    out = tuple(ZERO if s is ONE else Index(f"o{d}") for d, s in enumerate(shape))
    extents: dict[Expr, Expr] = {x: s for x, s in zip(out, shape, strict=True) if x is not ZERO}
    value = _bare(Reader(f, f.order[n], extents, frozenset({total})).value_at(n, out))
    if not (isinstance(value, Op) and value.name == "div"):
        return None
    top, bottom = (_bare(x) for x in value.args)
    below, more = bottom, None
    if isinstance(bottom, Op) and bottom.name == "add" and isinstance(bottom.args[1], Const):
        below, more = _bare(bottom.args[0]), bottom.args[1]
    if isinstance(bottom, Op) and bottom.name == "add" and isinstance(bottom.args[0], Const):
        below, more = _bare(bottom.args[1]), bottom.args[0]
    if beside is not None and isinstance(bottom, Op) and bottom.name == "add":
        below = next((y for x in bottom.args if isinstance(y := _bare(x), Load) and y.tensor == total.name), below)
    if not isinstance(top, Load) or not top.tensor.startswith(DOT):
        return None
    if not isinstance(below, Load) or below.tensor != total.name:
        return None
    sink: float | fx.Node | None = None if more is None else math.log(more.value) if more.value > 0 else math.nan
    invariant = frozenset[fx.Node]()
    if beside is not None:
        sink, invariant = beside.sink, beside.invariant
    product = contraction(f, f.by_name[top.tensor.removeprefix(DOT)])
    assert product is not None
    keeps = len(below.index) == f.rank(of)
    row = (*below.index[:dim], *below.index[dim + keeps :])
    for left in (True, False):
        frame = framed(f, n, product, out, shape, extents, top.index, left=left)
        reader = frame.reader(leaves=frozenset({exps}))
        weight = _bare(reader.value_at(frame.weights, frame.weights_at, frame.read))
        summed = _bare(reader.value_at(of, (*row[:dim], frame.c, *row[dim:]), f.order[total]))
        if weight is summed and isinstance(weight, Load) and weight.tensor == exps.name:
            if frame.c not in weight.index or sink is math.nan:
                return None
            keys, power = weight.index.index(frame.c), exponent(exps)
            if power is None:
                return frame, Term(Anchor(exps, exps, keys, sink=sink, ratio="plain"), weight.index, W, {})
            x, base = power
            plain = Anchor(exps, x, keys, reader=exps, sink=sink, base=base, invariant=invariant)
            anchor = without_maximum(f, plain)
            return frame, Term(anchor, weight.index, W, {})
    return None


def _bare(x: Expr) -> Expr:
    while isinstance(x, Op) and x.name in ROUNDINGS:
        x = x.args[0]
    return x
