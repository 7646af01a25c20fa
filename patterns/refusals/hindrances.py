"""What stands between a softmax and a product that is there: a reason never denies the product.

    digamma(q k^T).softmax(-1) v         it has no rule          softmax(q k^T + mask.double()).float() v
    stack([softmax(..), ..]).sum(0) v    the weights go through what is not read before they meet the values
"""

from __future__ import annotations

import torch
from torch import fx

from attncc.ir.reasons import Reason, because
from attncc.patterns.reader import ELEMENTS, VIEW_OPS, Facts, contraction, op_name

_STEPS = 40


def before_softmax(f: Facts, scores: fx.Node) -> Reason | None:
    """What of scores that hold a product of two computed tensors is not read; None where they hold none, or where all
    on the way to it has a rule."""
    seen: set[fx.Node] = set()
    stack: list[tuple[fx.Node, Reason | None]] = [(scores, None)]
    while stack and len(seen) < _STEPS:
        n, reason = stack.pop(0)
        if n in seen or n.op != "call_function" or not f.is_tensor(n):
            continue
        seen.add(n)
        product = contraction(f, n)
        if product is not None:
            if reason is not None and f.parameters.isdisjoint((product.lhs, product.rhs)):
                return reason
            continue
        held = [a for a in n.all_input_nodes if f.is_tensor(a) and f.rank(a) > 0]
        if n.target in VIEW_OPS or n.target in ELEMENTS:
            narrow = [a for a in held if f.dtype(a) != torch.float64 and f.dtype(a).is_floating_point]
            if f.dtype(n) == torch.float64 and narrow:
                reason = reason or because("scores-widened", f.dtype_name(narrow[0]) or "")
        elif (len(held) == 1 and f.shape(held[0]) == f.shape(n)) or _has_body(n):
            reason = reason or because("scores-function", _name(n))
        else:
            continue
        stack += [(a, reason) for a in held]
    return None


def before_values(f: Facts, at: fx.Node) -> Reason | None:
    """What becomes of the weights of a softmax on their way to a product with values, from their user `at` on; None
    where they reach none."""
    if at.op != "call_function" or contraction(f, at) is not None:
        return None
    found = because("weights-through", _name(at))
    return found if meets(f, at) else None


def meets(f: Facts, n: fx.Node) -> bool:
    """Whether what a node gives is a factor of a product with a tensor that is not learned, moved and changed element
    by element or summed on the way."""
    seen, stack = {n}, [n]
    while stack and len(seen) < _STEPS:
        x = stack.pop(0)
        for user in x.users:
            if user in seen or not f.is_tensor(user):
                continue
            product = contraction(f, user)
            if product is not None:
                sides = product.lhs, product.rhs
                if not seen.isdisjoint(sides) and f.parameters.isdisjoint(sides):
                    return True
                continue
            if user.target in VIEW_OPS or user.target in ELEMENTS or _name(user) in _JOINING:
                seen.add(user)
                stack.append(user)
    return False


def _has_body(n: fx.Node) -> bool:
    """Whether a node stands for what an operator that runs a graph of its own gives, of tensors that it is given."""
    return getattr(n.target, "namespace", "") == "shadow"


_JOINING = ("stack", "cat", "sum", "mean")


def _name(n: fx.Node) -> str:
    return op_name(n).rstrip("_")
