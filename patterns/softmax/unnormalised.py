"""Attention without a softmax: the weights are a function of one score alone (sigmoid, relu, its square, exp).

There is no normaliser to start from, so the search starts at each product and looks back, through what is moved or
computed element by element, for another product of two activations. A plain product of products (linear attention,
low-rank layers) is left alone: nothing makes weights of its scores.
"""

from __future__ import annotations

import math
from dataclasses import replace

from torch import fx

from attncc.ir.analysis import linear_factor, unrounded, zero_unless
from attncc.ir.attention import Normalizer, S
from attncc.ir.build import TRUE, and_
from attncc.ir.expr import Const, Expr, Op, loads, mentions, rewrite, walk
from attncc.ir.gradients import bounded, thawed
from attncc.ir.reasons import because
from attncc.patterns.site import (
    DOT,
    ELEMENTS,
    VIEW_OPS,
    Contraction,
    Facts,
    Lifted,
    Unreadable,
    assembled,
    contraction,
    frame,
    is_learned,
    is_maximum,
    op_name,
    products_in,
    stored,
)

_SEARCH = 40  # nodes looked at behind a product
_NONLINEAR = {
    "sigmoid", "exp", "relu", "tanh", "clamp_min", "clamp", "pow", "square", "maximum", "tril", "triu", "masked_fill",
    "where", "mul", "elu", "celu", "selu", "leaky_relu", "silu", "softplus", "log_sigmoid", "mish", "gelu", "exp2",
    "hardsigmoid", "hardswish", "threshold", "hardtanh", "relu6", "prelu", "abs", "sign", "erf", "log", "log1p", "sin",
    "cos", "clamp_max", "clip", "minimum", "addcmul",
}  # fmt: skip


def weighted_by_scores(f: Facts, n: fx.Node) -> tuple[Contraction, bool] | None:
    """The product that `n` is and whether weights are its left factor, where it may weigh values by scores."""
    product = contraction(f, n)
    if product is None or product.bias is not None or product.alpha != 1.0:
        return None
    for side, other, left in ((product.lhs, product.rhs, True), (product.rhs, product.lhs, False)):
        found = _scores_behind(f, side)
        if found is not None and not is_learned(f, other):
            return product, left
    return None


def _scores_behind(f: Facts, n: fx.Node) -> fx.Node | None:
    """A product of two activations that `n` is computed from, with something between that is not linear."""
    stack: list[tuple[fx.Node, bool]] = [(n, False)]
    for _ in range(_SEARCH):
        if not stack:
            return None
        node, nonlinear = stack.pop()
        product = contraction(f, node)
        if product is not None:
            if nonlinear and not is_learned(f, product.lhs) and not is_learned(f, product.rhs):
                return node
            continue
        if node.op != "call_function" or not (node.target in VIEW_OPS or node.target in ELEMENTS):
            continue
        name = op_name(node).rstrip("_")
        nonlinear = nonlinear or name in _NONLINEAR
        stack += [(a, nonlinear) for a in node.all_input_nodes if f.is_tensor(a)]
    return None


def lift_unnormalised(f: Facts, product: Contraction, left: bool) -> Lifted | None:
    """The attention whose weights `product` sums with, None if they are no function of one product of two tensors.

    Raises Unreadable and VerifyError."""
    whole = frame(f, product, left=left)
    c = whole.c
    value = whole.reader(pair=frozenset({c})).value_at(whole.weights, whole.weights_at, whole.read)
    found = next(iter(products_in(f, value, c, whole.rows)), None)
    if found is None:
        return None
    if found.row is not None:
        value = whole.reader(pair=frozenset({c, found.row})).value_at(whole.weights, whole.weights_at, whole.read)
    value = rewrite(value, lambda x: S if x is found.load else stored(f, x, whole.use, whole.extents))
    value, frozen = thawed(value, S)
    if S not in set(walk(value)) or _is_scaled(value, c) or any(x.tensor.startswith(DOT) for x in loads(value)):
        return None
    if any(is_maximum(f.by_name[x.tensor]) for x in loads(value)) and any(_is_huge(x) for x in walk(value)):
        raise Unreadable(product.node, because("scores-negligible"))
    normalizer, score, visible = _taken_apart(value, wants_grad=f.wants_grad(whole.use))
    score = frozen(score)
    parts = whole.parts(found, score, half=whole.weights, empty="nan")
    return assembled(replace(parts, mask=visible, normalizer=normalizer), product.node, product.node)


def _taken_apart(x: Expr, *, wants_grad: bool) -> tuple[Normalizer, Expr, Expr]:
    """(normaliser, score, visible) of a weight: hidden ones are zero, and a known outermost function has a name. Where
    gradients are `wants_grad`, a maximum with zero is `relu` only if its gradient at zero is zero."""
    visible: Expr = TRUE
    while (kept := zero_unless(unrounded(x))) is not None:
        visible, x = and_(visible, kept[0]), kept[1]
    x = unrounded(x)
    if isinstance(x, Op) and x.name == "sigmoid":
        return "sigmoid", x.args[0], visible
    found = bounded(x)
    if found is not None and found[0] == "max" and found[2].value == 0 and (not wants_grad or found[3] == 0):
        return "relu", found[1], visible
    return "none", x, visible


def _is_scaled(x: Expr, key: Expr) -> bool:
    """Whether a weight is its score times what is alike for every key: the two products are one linear map after
    another."""
    factor = linear_factor(x, S)
    return factor is not None and not mentions(factor, key)


def _is_huge(x: Expr) -> bool:
    return isinstance(x, Const) and isinstance(x.value, float) and 1e4 <= abs(x.value) < math.inf
