"""What becomes of the weights of a softmax: the products that sum over them, and everyone else who uses them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attncc.ir.build import ONE, const
from attncc.ir.expr import Index, free
from attncc.patterns.site import (
    SUMS_AND_MEANS,
    Contraction,
    Facts,
    Frame,
    Unreadable,
    argument,
    compares,
    contraction,
    element_rule,
    few,
    frame,
    made_of,
    meets,
    mixture,
    move,
    one_dim,
    op_name,
    written_args,
)
from attncc.patterns.softmax.anchors import Anchor, Term
from attncc.patterns.softmax.columns import chosen_columns
from attncc.patterns.softmax.mixed_heads import pooled
from attncc.patterns.softmax.sums_of_softmaxes import terms
from attncc.patterns.softmax.vector_weights import shares_components


@dataclass(frozen=True)
class Uses:
    """`products` sum over the keys of a softmax, `others` are products that sum over something else, `other_users` all
    other users of the weights. `alone`: such a product sums over a single key. `each`: values are
    weighted and summed element by element, with other weights for each component."""

    products: tuple[Frame, ...]
    others: tuple[fx.Node, ...]
    other_users: tuple[fx.Node, ...]
    alone: bool
    each: bool


class Weights:
    """What the products of a graph weigh their values with, each read once."""

    def __init__(self, anchors: Mapping[str, Anchor]) -> None:
        self.anchors = anchors
        self._read: dict[tuple[fx.Node, fx.Node], list[Term] | Unreadable] = {}

    def of(self, frame: Frame) -> list[Term]:
        """The softmaxes in the weights of a product. Raises Unreadable."""
        key = frame.product.node, frame.weights
        if key not in self._read:
            try:
                self._read[key] = terms(frame, self.anchors)
            except Unreadable as error:
                self._read[key] = error
        found = self._read[key]
        if isinstance(found, Unreadable):
            raise found
        return found


def uses(f: Facts, anchor: Anchor, weights: Weights) -> Uses:
    """Who uses the weights of an anchor, through what is moved, computed element by element, or mixed over heads."""
    products: list[Frame] = []
    others: list[fx.Node] = []
    other_users: list[fx.Node] = []
    seen: set[fx.Node] = {anchor.node}
    carried: set[fx.Node] = set()
    each = False
    stack = [anchor.node]
    while stack:
        n = stack.pop(0)
        for user in n.users:
            if user in seen or user not in f.live:
                continue
            product = contraction(f, user) or chosen_columns(f, user)
            mixes = mixture(f, user)
            side = None if product is None else _factor(product, n, seen)
            levels = False  # elements weighted and summed, and no row has keys to choose from
            if product is not None and side is not None:
                found = frame(f, product, left=side is product.lhs)
                apart = side is not n and found.e is None
                levels = apart or (side is not n and not found.rows and not compares(f, anchor.scores))
                each = each or (apart and shares_components(found))
                if not levels:
                    seen.add(user)
                    if _sums_over(found, anchor, weights):
                        products.append(found)
                        continue
                    others.append(user)
            summed = levels and not compares(f, anchor.scores)  # levels: what they give is no weight any more
            if (mixes is not None and n is mixes.lhs) or (not summed and _carries(f, user, n)):
                seen.add(user)
                stack.append(user)
                carried.add(user)
            elif (product is None or levels) and user not in other_users and not _is_size(user):
                other_users.append(user)
    products.sort(key=lambda x: f.order[x.node])
    alone = any(x is not None and x.extent is ONE for x in (contraction(f, n) for n in others))
    ends = [x for x in others if x not in carried] if other_users else others  # else a mixture is all there is to tell
    return Uses(tuple(products), tuple(ends), tuple(other_users), alone, each)


def _factor(product: Contraction, n: fx.Node, seen: set[fx.Node]) -> fx.Node | None:
    """The factor of a product that holds the weights which `n` does: `n` itself, or, where the product is written out
    and `n` holds what it sums, the one that was met on the way."""
    sides = (product.lhs, product.rhs)
    return n if n in sides else next((x for x in sides if x in seen), None)


def _sums_over(found: Frame, anchor: Anchor, weights: Weights) -> bool:
    try:
        read = weights.of(found)
    except Unreadable:
        return True  # whoever lifts it gives the reason
    return any(t.anchor is anchor and found.c in free(t.at[anchor.dim]) for t in read)


#: What gives several tensors, each a part of the one.
_SEVERAL = {"aten.split", "aten.split_with_sizes", "aten.chunk", "aten.unbind", "aten.tensor_split"}

_PADS = (torch.ops.aten.pad.default, torch.ops.aten.constant_pad_nd.default)


def _carries(f: Facts, user: fx.Node, n: fx.Node) -> bool:
    """Whether `user` holds the values of `n`, moved or changed element by element, or writes over some of them."""
    if n in written_args(user):
        return True
    if str(getattr(user.target, "overloadpacket", "")) in _SEVERAL or user.target in _PADS:
        return True
    if op_name(user) == "stack" or (user.target in SUMS_AND_MEANS and (_sums_stacked(f, user) or _weighs(f, user))):
        return meets(f, user)
    if pooled(f, user) is not None and not _divides(user):  # a mean over heads, whose rows weigh values once more
        return meets(f, user) or any(chosen_columns(f, x) is not None for x in user.users)
    if user.op != "call_function" or not f.is_tensor(user):
        return False
    return _moves(f, user) or element_rule(user.target) is not None


def _sums_stacked(f: Facts, user: fx.Node) -> bool:
    """Whether a sum is over as many elements as were stacked to what it sums."""
    source: Any = user.args[0]
    dim = one_dim(f, source, argument(user, "dim"))
    stacks = [x for x in made_of(f, source, ()) if op_name(x) == "stack"]
    return dim is not None and any(f.shape(source)[dim] is const(len(x.all_input_nodes)) for x in stacks)


def _divides(n: fx.Node) -> bool:
    return any(op_name(u).rstrip("_") == "div" and n in u.args[1:2] for u in n.users)


def _weighs(f: Facts, user: fx.Node) -> bool:
    """Whether a sum weighs each of a few elements: softmaxes beside each other, as those of several spans."""
    product = contraction(f, user)
    return product is not None and product.bias is None and few(product.extent)


def _moves(f: Facts, user: fx.Node) -> bool:
    extents = {Index(f"x{d}"): s for d, s in enumerate(f.shape(user))}
    moved = move(f, user, tuple(extents), extents, crossing=True)  # type: ignore[arg-type]
    return moved is not None


def _is_size(n: fx.Node) -> bool:
    return not isinstance(n.meta.get("val"), torch.Tensor | list | tuple) and n.op != "output"
