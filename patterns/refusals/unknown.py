"""Products weighted by scores in a way that no rule knows: said, so that no attention is passed over in silence.

    act(q k^T) v  for an `act` without a rule            (q k^T / norm(q k^T)) v
    act(w . [q_i, k_j]) v                                one_hot(argmax(q k^T)) v
    q_i (S_0 + .. + S_i)  for states of tokens or chunks that no linear attention was recognised in
    q_i * (sum_j k_j * v_j)  element by element
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

from torch import fx

from attncc.ir.build import ONE
from attncc.ir.reasons import Reason, because
from attncc.patterns.reader import (
    ELEMENTS,
    SUMS_AND_MEANS,
    VIEW_OPS,
    Contraction,
    Facts,
    argument,
    contraction,
    factored,
    one_dim,
    op_name,
)
from attncc.patterns.refusals.reasons import drops, each_pair, made_of, pairs

_STEPS = 24
_REDUCTIONS = ("sum", "mean", "amax", "max", "norm", "linalg_vector_norm", "var", "std", "logsumexp", "cumsum")


def unknown_weights(f: Facts, data: Container[fx.Node]) -> Iterator[tuple[Reason, fx.Node, fx.Node]]:
    """(reason, where it shows, the product with the values), in order."""
    for n in f.graph.nodes:
        if n not in f.live or n not in data:
            continue
        outer = contraction(f, n)
        if outer is not None and outer.bias is None:
            sides = [(outer.lhs, outer.rhs), (outer.rhs, outer.lhs)]
        elif _name(n) == "einsum" and len(n.all_input_nodes) == 3:
            sides = [(x, next(y for y in n.all_input_nodes if y is not x)) for x in n.all_input_nodes]
        elif _name(n) == "mul":
            found = _channels(f, n, data)
            if found is not None:
                yield because("linear-channels"), found, n
            continue
        elif _name(n) in ("gather", "index_select", "take_along_dim"):
            sides = [(n.all_input_nodes[-1], n.all_input_nodes[0])]
        else:
            continue
        rules = _RULES if outer is not None else (_running,) if _name(n) == "einsum" else (_picked,)
        sides = [(w, v) for w, v in sides if v in data and not each_pair(f, v)]
        tried = (rule(f, weights, data) for rule in rules for weights, _ in sides)
        found = next((x for x in tried if x is not None), None)
        if found is not None:
            yield (*found, n)


def _between(f: Facts, weights: fx.Node, data: Container[fx.Node]) -> tuple[Reason, fx.Node] | None:
    """What makes weights of scores, where it is not known: (reason, node)."""
    n, reason, known = weights, None, True
    for _ in range(_STEPS):
        if n.op != "call_function":
            return None
        product = contraction(f, n)
        if product is not None:
            return reason if reason is not None and _compares(f, product, data) else None
        held = [a for a in n.all_input_nodes if f.is_tensor(a)]
        if n.target in VIEW_OPS or n.target in ELEMENTS or _name(n) == "index_put":
            divisor = n.args[1] if _name(n) == "div" and len(n.args) > 1 else None
            reduced = _reduction(f, divisor) if isinstance(divisor, fx.Node) else None
            if drops(n):
                reason = because("dropout"), n
            elif reduced is not None and reason is None:
                reason = because("unknown-normaliser", _name(reduced)), n
            held = [a for a in held if f.rank(a) > 0][:1]
        elif len(held) == 1 and f.is_tensor(n) and f.shape(held[0]) == f.shape(n):
            if known:  # it says more than what is done with it later
                reason = because("unknown-function", _name(n)), n
            known = False
        if len(held) != 1:
            return None
        n = held[0]
    return None


def _running(f: Facts, n: fx.Node, data: Container[fx.Node]) -> tuple[Reason, fx.Node] | None:
    """A running sum of products of two data tensors."""
    for x in made_of(f, n, (*_LINEAR, "pad", "constant_pad_nd", "slice")):
        if _name(x) != "cumsum":
            continue
        of = next((y for y in made_of(f, x.all_input_nodes[0], _LINEAR) if contraction(f, y) is not None), None)
        product = None if of is None else contraction(f, of)
        if product is not None and product.lhs in data and product.rhs in data:
            return because("running-sum-of-chunks"), x
        factors = factored(f, x, x.all_input_nodes[0]) if f.rank(x) > 2 else None
        if factors is not None and all(y.node in data for y in factors):
            return because("running-sum"), x
    return None


def _channels(f: Facts, n: fx.Node, data: Container[fx.Node]) -> fx.Node | None:
    """The sum over tokens of products of two data tensors that `n` multiplies a third with (Bolya et al., 2022: arXiv
    2209.07484)."""
    sides = [x for x in n.all_input_nodes if f.is_tensor(x)]
    for total, q in (sides, sides[::-1]) if len(sides) == 2 else ():
        x = total
        while x.op == "call_function" and x.target in VIEW_OPS:
            x = x.all_input_nodes[0]
        if x.target not in SUMS_AND_MEANS or contraction(f, x) is not None or q not in data:
            continue
        source: Any = x.args[0]
        dim, factors = one_dim(f, source, argument(x, "dim")), factored(f, x, source)
        whole = dim is not None and f.rank(source) == f.rank(q) and f.shape(source)[dim] is f.shape(q)[dim] is not ONE
        if whole and dim != f.rank(q) - 1 and factors is not None:
            k, v = (y.node for y in factors)
            if len({k, v, q}) == 3 and all(y in data and f.shape(y) == f.shape(q) for y in (k, v)):
                return x
    return None


def _picked(f: Facts, n: fx.Node, data: Container[fx.Node]) -> tuple[Reason, fx.Node] | None:
    """One key picked by the largest of its scores."""
    for x in made_of(f, n, (*_LINEAR, "one_hot", "scatter", "eq", "arange")):
        if _name(x) == "argmax":
            scores = made_of(f, x.all_input_nodes[0], ())
            products = (contraction(f, y) for y in scores)
            if any(p is not None and _compares(f, p, data) for p in products):
                return because("hard-attention"), x
    return None


def _paired(f: Facts, n: fx.Node, data: Container[fx.Node]) -> tuple[Reason, fx.Node] | None:
    """A function of what joins one row of each of two data tensors."""
    for x in made_of(f, n, (*_LAYERS, "sum", "cat")):
        if x in data and pairs(f, x):
            return because("weights-additive"), x
    return None


_RULES = (_running, _picked, _between, _paired)
_LINEAR = ("mul", "to", "div")
_LAYERS = ("linear", "matmul", "mm", "addmm", "conv2d", "conv1d", "einsum", "batch_norm")


def _compares(f: Facts, product: Contraction, data: Container[fx.Node]) -> bool:
    """Whether a product is of two tensors that the model computes, and has a row for each pair of them."""
    return product.bias is None and product.lhs in data and product.rhs in data and f.rank(product.node) >= 2


def _reduction(f: Facts, n: fx.Node) -> fx.Node | None:
    """The reduction that a divisor is, moved or kept away from zero."""
    for _ in range(_STEPS):
        if _name(n) in _REDUCTIONS:
            return n
        held = [a for a in n.all_input_nodes if f.is_tensor(a) and f.rank(a) > 0]
        if not held or not (n.target in VIEW_OPS or n.target in ELEMENTS):
            return None
        n = held[0]
    return None


def _name(n: fx.Node) -> str:
    return op_name(n).rstrip("_")
