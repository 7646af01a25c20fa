"""Weights of each component's own (vector attention), which no attention over tokens says:

    out[i, c] = sum_j w[i, j, c] * v[j, c],    sum_j w[i, j, c] = 1

Point transformers write it with a softmax, attention-free transformers (Zhai et al., 2021: arXiv 2105.14103) as a
quotient of two sums over exp(w[i, j]) * exp(k[j, c]).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from attncc.ir.build import ONE
from attncc.ir.expr import Expr, Index, free
from attncc.ir.reasons import Reason, because
from attncc.patterns.site import (
    ELEMENTS,
    SUMS_AND_MEANS,
    VIEW_OPS,
    Facts,
    Frame,
    argument,
    contraction,
    one_dim,
    op_name,
    skip_casts,
    unexpanded,
)

_STEPS = 12
_POSITIVE = {"exp", "exp2", "sigmoid", "softplus", "relu", "elu", "square", "abs"}


def vector_quotients(f: Facts) -> Iterator[tuple[Reason, fx.Node, fx.Node]]:
    """(reason, quotient, sum of weighted values) for values that are divided, component by component, by the sum of
    what they were weighed with."""
    for n in f.graph.nodes:
        if op_name(n).rstrip("_") != "div" or n not in f.live or not all(f.is_tensor(x) for x in n.args[:2]):
            continue
        top: Any = n.args[0]
        bottom: Any = n.args[1]
        total = next(_sums(f, bottom), None)
        if total is None:
            continue
        for summed in _sums(f, top):
            alike = _extents(f, summed) == _extents(f, total)
            shared = [x for x in _weighed(f, total)[:1] if x in _weighed(f, summed)]
            if summed is not total and alike and any(_is_made_positive(f, x) for x in shared):
                yield because("vector-attention"), n, summed
                break


def _is_made_positive(f: Facts, n: fx.Node) -> bool:
    """Whether weights are made of what may be negative: others (a mask, lengths) are no scores but a mean's."""
    stack, seen = [n], {n}
    while stack and len(seen) < _STEPS:
        x = stack.pop(0)
        if op_name(x).rstrip("_") in _POSITIVE:
            return True
        if x.op == "call_function" and (x.target in VIEW_OPS or x.target in ELEMENTS):
            fresh = [a for a in x.all_input_nodes if f.is_tensor(a) and a not in seen]
            seen.update(fresh)
            stack += fresh
    return False


def weighs_components(f: Facts, weights: fx.Node, dim: int, total: fx.Node) -> bool:
    """Whether a softmax along `dim` weighs values of its own shape, element by element, and `total` sums them along the
    same dimension."""
    product: Any = total.args[0] if total.args else None
    if total.target not in SUMS_AND_MEANS or not f.is_tensor(product) or op_name(product).rstrip("_") != "mul":
        return False
    along = one_dim(f, product, argument(total, "dim"))
    values = [x for x in product.args if isinstance(x, fx.Node) and x is not weights]
    if any(_extents(f, unexpanded(f, x)) == [f.shape(product)[along or 0]] for x in values):
        return False  # one value for each weight, the same for all rows: an expectation
    return f.shape(product) == f.shape(weights) and along == dim and f.shape(weights)[-1] is not ONE


def shares_components(frame: Frame) -> bool:
    """Whether a product weighs the last dimension of its values with weights that have it too."""
    last = frame.values_at[-1]
    return frame.e is None and isinstance(last, Index) and last is not frame.c and last in free(*frame.weights_at)


def _sums(f: Facts, n: fx.Node) -> Iterator[fx.Node]:
    """Sums and products that a tensor is, moved or changed element by element."""
    stack, seen = [n], {n}
    while stack and len(seen) < _STEPS:
        x = stack.pop(0)
        if x.target in SUMS_AND_MEANS or contraction(f, x) is not None:
            yield x
        elif x.op == "call_function" and (x.target in VIEW_OPS or x.target in ELEMENTS):
            fresh = [a for a in x.all_input_nodes if f.is_tensor(a) and a not in seen]
            seen.update(fresh)
            stack += fresh


def _extents(f: Facts, n: fx.Node) -> list[Expr]:
    return [s for s in f.shape(n) if s is not ONE]


def _weighed(f: Facts, n: fx.Node) -> list[fx.Node]:
    """What a sum sums: the right factor of a product (with what it is made of by multiplying), or its elements."""
    product = contraction(f, n) if n.target not in SUMS_AND_MEANS else None
    found = [n.args[0]] if product is None else [product.rhs, product.lhs]
    nodes = [x for x in (skip_casts(y) if isinstance(y, fx.Node) else None for y in found) if x is not None]
    for x in nodes[:]:
        if op_name(x).rstrip("_") == "mul":
            nodes += [a for a in x.all_input_nodes if f.is_tensor(a)]
    return nodes
