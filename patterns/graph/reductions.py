"""Reductions along one dimension as models spell them, and what casts and groups hide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from attncc.ir.expr import Expr
from attncc.patterns.graph.facts import Facts
from attncc.patterns.graph.operators import argument, op_name

aten = torch.ops.aten
CASTS = (aten.to.dtype, aten._to_copy.default, aten.clone.default, aten.detach.default)
_REDUCTIONS: dict[object, Literal["sum", "max", "any", "all", "logsumexp"]] = {
    aten.sum.dim_IntList: "sum", aten.amax.default: "max", aten.max.dim: "max", aten.any.dim: "any",
    aten.all.dim: "all", aten.logsumexp.default: "logsumexp", aten.special_logsumexp.default: "logsumexp",
}  # fmt: skip


@dataclass(frozen=True)
class Reduction:
    """`node` is op_key(source[.., key, ..]), the key being dimension `dim` of the source, which is `kept` or gone."""

    op: Literal["sum", "max", "any", "all", "logsumexp"]
    node: fx.Node
    source: fx.Node
    dim: int
    kept: bool

    def inside(self, at: tuple[Expr, ...], key: Expr) -> tuple[Expr, ...]:
        """Where the source is read for an element of the node and a key."""
        return (*at[: self.dim], key, *at[self.dim + self.kept :])


def reduction(f: Facts, n: fx.Node | None) -> Reduction | None:
    """What a node reduces along one dimension, the first of two results too; None where it does no such thing."""
    if n is not None and op_name(n) == "getitem" and n.args[1] == 0:
        (n,) = n.all_input_nodes
    found = None if n is None else _REDUCTIONS.get(n.target)
    if n is None or found is None:
        return None
    source: Any = n.args[0]
    dim = one_dim(f, source, argument(n, "dim"))
    return None if dim is None else Reduction(found, n, source, dim, bool(argument(n, "keepdim")))


def one_dim(f: Facts, n: fx.Node, dim: Any) -> int | None:
    """One dimension out of an int or a list of one."""
    dims: tuple[Any, ...] = (dim,) if isinstance(dim, int) else tuple(dim or ())
    return int(dims[0]) % max(f.rank(n), 1) if len(dims) == 1 else None


def is_maximum(n: fx.Node) -> bool:
    """Whether a node is the maximum along dimensions of a tensor."""
    if op_name(n) == "getitem" and n.args[1] == 0:
        n = n.all_input_nodes[0]
    return _REDUCTIONS.get(n.target) == "max"


def skip_casts(n: Any) -> fx.Node | None:
    while isinstance(n, fx.Node) and n.target in CASTS:
        n = n.args[0]
    return n if isinstance(n, fx.Node) else None


def scattered(n: Any) -> fx.Node | None:
    """What is summed by groups that are numbered in a tensor, where each element reads the sum of its own group."""
    n = _kept_from_zero(n)
    if n is None or op_name(n) not in ("index_select", "gather", "index"):
        return None
    total = _kept_from_zero(n.args[0])
    source = None if total is None else _SCATTERS.get(op_name(total).rstrip("_"))
    return None if total is None or source is None else skip_casts(argument(total, source))


_SCATTERS = {"scatter_add": "src", "scatter_reduce": "src", "index_add": "source"}


def _kept_from_zero(n: Any) -> fx.Node | None:
    """What something small is added to."""
    n = skip_casts(n)
    while n is not None and op_name(n).rstrip("_") in ("add", "clamp", "clamp_min"):
        n = skip_casts(n.args[0])
    return n
