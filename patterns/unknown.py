"""Products weighted by scores in a way that no rule knows: said, so that no attention is passed over in silence.

    act(q k^T) v  for an `act` without a rule            (q k^T / norm(q k^T)) v
"""

from __future__ import annotations

from collections.abc import Container, Iterator

from torch import fx

from attncc.patterns.contractions import Contraction, contraction
from attncc.patterns.elements import ELEMENTS
from attncc.patterns.facts import Facts
from attncc.patterns.moves import MOVES
from attncc.patterns.schema import op_name

_STEPS = 24
_REDUCTIONS = ("sum", "mean", "amax", "max", "norm", "linalg_vector_norm", "var", "std", "logsumexp", "cumsum")


def unknown_weights(f: Facts, data: Container[fx.Node]) -> Iterator[tuple[str, fx.Node, fx.Node]]:
    """(reason, where it shows, the product with the values), in order."""
    for n in f.graph.nodes:
        outer = contraction(f, n) if n in f.live and n in data else None
        if outer is None or outer.bias is not None:
            continue
        for weights, values in ((outer.lhs, outer.rhs), (outer.rhs, outer.lhs)):
            found = _between(f, weights, data) if values in data else None
            if found is not None:
                yield (*found, n)
                break


def _between(f: Facts, weights: fx.Node, data: Container[fx.Node]) -> tuple[str, fx.Node] | None:
    """What makes weights of scores, where it is not known: (reason, node)."""
    n, reason, known = weights, None, True
    for _ in range(_STEPS):
        if n.op != "call_function":
            return None
        product = contraction(f, n)
        if product is not None:
            return reason if reason is not None and _compares(f, product, data) else None
        held = [a for a in n.all_input_nodes if f.is_tensor(a)]
        if n.target in MOVES or n.target in ELEMENTS or _name(n) == "index_put":
            divisor = n.args[1] if _name(n) == "div" and len(n.args) > 1 else None
            reduced = _reduction(f, divisor) if isinstance(divisor, fx.Node) else None
            if reduced is not None and reason is None:
                reason = f"weights divided by the {_name(reduced)} of their scores are no normaliser that is known", n
            held = [a for a in held if f.rank(a) > 0][:1]
        elif len(held) == 1 and f.is_tensor(n) and f.shape(held[0]) == f.shape(n):
            if known:  # it says more than what is done with it later
                reason = f"its weights are {_name(n)} of scores, which has no rule", n
            known = False
        if len(held) != 1:
            return None
        n = held[0]
    return None


def _compares(f: Facts, product: Contraction, data: Container[fx.Node]) -> bool:
    """Whether a product is of two tensors that the model computes, and has a row for each pair of them."""
    return product.bias is None and product.lhs in data and product.rhs in data and f.rank(product.node) >= 2


def _reduction(f: Facts, n: fx.Node) -> fx.Node | None:
    """The reduction that a divisor is, moved or kept away from zero."""
    for _ in range(_STEPS):
        if _name(n) in _REDUCTIONS:
            return n
        held = [a for a in n.all_input_nodes if f.is_tensor(a) and f.rank(a) > 0]
        if not held or not (n.target in MOVES or n.target in ELEMENTS):
            return None
        n = held[0]
    return None


def _name(n: fx.Node) -> str:
    return op_name(n).rstrip("_")
