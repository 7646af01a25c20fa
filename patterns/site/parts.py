"""What is read of an attention before it is put together: its parts, and where the rows of its sums lie."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from attncc.ir.attention import Empty, Normalizer, Output, W
from attncc.ir.build import TRUE
from attncc.ir.expr import Expr, Index
from attncc.patterns.site.materialised import Source
from attncc.patterns.site.reading import Facts, Point


@dataclass(frozen=True)
class Parts:
    """What was read of an attention, over the indices of its output (`out`: zero where the extent is 1).

    `i` and `e` are None where the output has no such axis. `product_dtype` and `dtype` are those of the two products:
    under autocast operands are cast to them. `summed` are batch indices of no output, which is a sum over them.
    `zeroed`: rows in which the mask hides every key are zero, whatever it is filled with."""

    facts: Facts
    out: Point
    out_shape: tuple[Expr, ...]
    i: Expr | None
    j: Index
    d: Index
    e: Expr | None
    extents: dict[Expr, Expr]
    q: Source
    k: Source
    v: Source
    score: Expr
    product_dtype: torch.dtype
    dtype: torch.dtype
    half: bool
    empty: Empty
    mask: Expr = TRUE
    sink: Expr | None = None
    weight: Expr = W
    normalizer: Normalizer = "softmax"
    outputs: tuple[Output, ...] = ("out",)
    summed: tuple[Expr, ...] = ()
    zeroed: bool = False


@dataclass(frozen=True)
class Rows:
    """How the rows (*batch, i) of an attention lie in a tensor of the model: in `shape`, where axes are split, and then
    permuted by `order`; as they are where that is empty."""

    shape: tuple[Expr, ...] = ()
    order: tuple[int, ...] = ()


@dataclass(frozen=True)
class Lse:
    """`node` holds the logarithm of a row's sum of exponentials, its rows as `rows` says."""

    node: fx.Node
    rows: Rows = Rows()
    base_two: bool = False
