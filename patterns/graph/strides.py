"""How a result lies in memory, and whether anybody notices.

A kernel may lay its output out otherwise than the operation it takes the place of, which saves the model the copy that
follows. It must not where a view counts on the strides, a write goes through one, or the result leaves the graph.
Operations that compute element by element hand the layout on.
"""

from __future__ import annotations

import torch
from torch import fx

from attncc.ir.affine import poly
from attncc.ir.build import ONE, mul
from attncc.ir.expr import Expr
from attncc.patterns.graph.facts import Facts
from attncc.patterns.graph.operators import hint, op_name

#: Operations whose results lie the same however their inputs do.
_SETTLE = {
    "reshape", "reshape_as", "flatten", "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "mv", "dot",
    "einsum", "layer_norm", "native_layer_norm", "group_norm", "native_group_norm", "embedding",
    "scaled_dot_product_attention",
}  # fmt: skip
#: Operations that read strides: what they give depends on them, or they fail.
_READ = {"view", "_unsafe_view", "view_as", "as_strided", "view_as_complex", "view_as_real"}
_SIZES = {"sym_size", "size", "sym_numel", "numel", "dim"}
_MOST = 64


def order_in_memory(value: torch.Tensor) -> tuple[int, ...]:
    """The dimensions from the slowest to the fastest; those of one element stand before the next that has more."""
    strides = [hint(x) or 0 for x in value.stride()]
    sizes = [hint(x) for x in value.shape]
    key: list[int] = []
    for d in reversed(range(value.dim())):
        key.insert(0, strides[d] if sizes[d] != 1 or not key else max(key[0], strides[d]))
    return tuple(sorted(range(value.dim()), key=lambda d: -key[d]))


def noticed(f: Facts, n: fx.Node) -> bool:
    """Whether somebody could tell how `n` lies in memory."""
    stack, seen = [n], {n}
    while stack:
        x = stack.pop()
        if _written(f, x) or len(seen) > _MOST:
            return True
        for user in x.users:
            if user in seen or user not in f.live or op_name(user) in _SIZES:
                continue
            seen.add(user)
            made = isinstance(f.value(user), torch.Tensor | list | tuple)
            if user.op != "call_function" or not made or (op_name(user) in _READ and not _splits(f, x, user)):
                return True
            if not _settles(user):
                stack.append(user)
            elif _written(f, user):  # the model's own copy may be none of ours
                return True
    return False


def _splits(f: Facts, n: fx.Node, user: fx.Node) -> bool:
    """Whether a view takes dimensions apart and joins none, which every layout allows."""
    if op_name(user) != "view" or f.dtype(user) != f.dtype(n):
        return False
    left = list(f.shape(user))
    for size in f.shape(n):
        part: Expr = ONE
        while left and poly(part) != poly(size):
            part = mul(part, left.pop(0))
        if poly(part) != poly(size):
            return False
    return all(size is ONE for size in left)


def _written(f: Facts, n: fx.Node) -> bool:
    return bool(f.writes(n, f.order[n] - 1, len(f.nodes)))


def _settles(n: fx.Node) -> bool:
    if op_name(n) in ("clone", "contiguous"):
        asked = n.kwargs.get("memory_format")
        return asked is torch.contiguous_format or (asked is None and op_name(n) == "contiguous")
    return op_name(n) in _SETTLE
