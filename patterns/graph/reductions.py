"""Sums and maxima along a dimension as models spell them, and whether two nodes hold the same values."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from attncc.patterns.graph.facts import Facts
from attncc.patterns.graph.operators import argument, op_name

aten = torch.ops.aten
CASTS = (aten.to.dtype, aten._to_copy.default, aten.clone.default, aten.detach.default)
SUMS = (aten.sum.dim_IntList,)
MAXES = (aten.amax.default, aten.max.dim)
EXPS = (aten.exp.default, aten.exp_.default, aten.exp2.default, aten.exp2_.default, aten.pow.Scalar)
_NATURAL = EXPS[:2]


def tensor(x: Any) -> fx.Node | None:
    return x if isinstance(x, fx.Node) else None


def one_dim(f: Facts, n: fx.Node, dim: Any) -> int | None:
    """One dimension out of an int or a list of one."""
    dims: tuple[Any, ...] = (dim,) if isinstance(dim, int) else tuple(dim or ())
    return int(dims[0]) % max(f.rank(n), 1) if len(dims) == 1 else None


def skip_casts(n: fx.Node | None) -> fx.Node | None:
    while n is not None and n.target in CASTS:
        n = tensor(n.args[0])
    return n


def exponent(n: fx.Node) -> tuple[fx.Node, float | None] | None:
    """(x, base) where a node is base ** x, the base None for that of natural logarithms."""
    if n.target is aten.pow.Scalar:
        base, x = n.args[0], tensor(n.args[1])
        return (x, float(base)) if isinstance(base, int | float) and base > 0 and x is not None else None
    x = tensor(n.args[0]) if n.target in EXPS else None
    return None if x is None else (x, None if n.target in _NATURAL else 2.0)


def is_maximum(n: fx.Node) -> bool:
    """Whether a node is the maximum along dimensions of a tensor."""
    if getattr(n.target, "__name__", "") == "getitem" and n.args[1] == 0:
        n = n.all_input_nodes[0]
    return n.target in MAXES


def reduction(f: Facts, n: fx.Node | None, targets: tuple[object, ...]) -> tuple[fx.Node, fx.Node, int] | None:
    """(reduction, what it reduces, dimension) where `n` is a reduction with one of the ops that keeps its dimension, or
    has it put back: without, it would broadcast along another one."""
    n = skip_casts(n)
    restored: Any = None
    if n is not None and n.target is aten.unsqueeze.default:
        restored = argument(n, "dim") % f.rank(n)
        n = skip_casts(tensor(n.args[0]))
    if n is not None and getattr(n.target, "__name__", "") == "getitem" and n.args[1] == 0:
        n = tensor(n.args[0])
    of = tensor(n.args[0]) if n is not None and n.target in targets else None
    if n is None or of is None:
        return None
    dim = one_dim(f, of, argument(n, "dim"))
    kept = restored is None if argument(n, "keepdim") else restored == dim
    return (n, of, dim) if dim is not None and kept else None


def scattered(n: fx.Node | None) -> fx.Node | None:
    """What is summed by groups that are numbered in a tensor, where each element reads the sum of its own group."""
    n = _kept_from_zero(n)
    if n is None or op_name(n) not in ("index_select", "gather", "index"):
        return None
    total = _kept_from_zero(tensor(n.args[0]))
    source = None if total is None else _SCATTERS.get(op_name(total).rstrip("_"))
    return None if total is None or source is None else skip_casts(tensor(argument(total, source)))


_SCATTERS = {"scatter_add": "src", "scatter_reduce": "src", "index_add": "source"}


def _kept_from_zero(n: fx.Node | None) -> fx.Node | None:
    """What something small is added to."""
    n = skip_casts(n)
    while n is not None and op_name(n).rstrip("_") in ("add", "clamp", "clamp_min"):
        n = skip_casts(tensor(n.args[0]))
    return n


def alike(f: Facts, a: fx.Node, seen_a: fx.Node, b: fx.Node, seen_b: fx.Node, depth: int = 8) -> bool:
    """Whether `a` as `seen_a` reads it and `b` as `seen_b` reads it are the same values: one node, or one operation on
    the same inputs, with no write to it in between."""
    if a is b:
        return not written(f, a, seen_a, seen_b)
    if a.target is not b.target or a.target not in _REPEATABLE or a.kwargs != b.kwargs or len(a.args) != len(b.args):
        return False
    if depth == 0 or written(f, a, a, seen_a) or written(f, b, b, seen_b):
        return False
    return all(
        alike(f, x, a, y, b, depth - 1) if isinstance(x, fx.Node) and isinstance(y, fx.Node) else x == y
        for x, y in zip(a.args, b.args, strict=True)
    )


_REPEATABLE = {
    operator.getitem, aten.exp.default, aten.exp2.default, aten.pow.Scalar, aten.pow.Tensor_Scalar, aten.relu.default,
    aten.sigmoid.default, aten.softplus.default, aten.square.default, aten.abs.default, aten.sub.Tensor, *CASTS, *MAXES,
}  # fmt: skip


def written(f: Facts, n: fx.Node, *between: fx.Node) -> bool:
    """Whether something writes to `n` after the first and before the last of some nodes."""
    at = sorted(f.order[x] for x in between)
    return bool(f.writes(n, at[0], at[-1]))
