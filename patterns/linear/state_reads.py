"""Who reads a state that is carried over time."""

from __future__ import annotations

from torch import fx

from attncc.patterns.site import VIEW_OPS, Facts, contraction, op_name


def through(n: fx.Node) -> fx.Node:
    """What a node is a move or a cast of."""
    while n.op == "call_function" and (n.target in VIEW_OPS or op_name(n) in ("to", "_to_copy")):
        n = n.all_input_nodes[0]
    return n


def reads_of(f: Facts, n: fx.Node) -> list[fx.Node]:
    """Products and sums of products that read a state, moved or cast."""
    found: list[fx.Node] = []
    stack, seen = [n], {n}
    while stack:
        for user in stack.pop().users:
            if user in seen or user not in f.live or not f.is_tensor(user):
                continue
            seen.add(user)
            if contraction(f, user) is not None:
                found.append(_split(f, user))
            elif op_name(user) == "mul":
                found += [x for x in user.users if op_name(x) == "sum" and x in f.live]
            elif user.target in VIEW_OPS or op_name(user) in ("to", "_to_copy"):
                stack.append(user)
    return found


def _split(f: Facts, product: fx.Node) -> fx.Node:
    """A product of batches that were made one, as the tensor with several again that is all that is read of it."""
    users = [x for x in product.users if x in f.live]
    apart = len(users) == 1 and users[0].target in VIEW_OPS and f.shape(users[0])[0] is not f.shape(product)[0]
    return users[0] if apart else product
