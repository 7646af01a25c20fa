"""The frame of a product: what an element of its result sums over, in the indices that an attention has.

    node[out] = sum_c weights[weights_at] * values[values_at],   c < extents[c]

Attention with and without a softmax starts here: the weights are then read at a point, and what they are made of is the
score. Indices are zero where an extent is 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx

from attncc.ir.attention import Empty
from attncc.ir.build import ONE, ZERO
from attncc.ir.expr import Expr, Index, free
from attncc.ir.reasons import because
from attncc.patterns.site.materialised import Source
from attncc.patterns.site.operands import operand
from attncc.patterns.site.parts import Parts
from attncc.patterns.site.products import Product
from attncc.patterns.site.reading import Contraction, Facts, Point, Reader, Unreadable


@dataclass(frozen=True)
class Frame:
    """`node` is what a fused kernel takes the place of: the product, or what is read of it at `out`."""

    facts: Facts
    node: fx.Node
    product: Contraction
    out: Point
    shape: tuple[Expr, ...]
    c: Index
    extents: Mapping[Expr, Expr]
    weights: fx.Node
    weights_at: Point
    values: fx.Node
    values_at: Point

    @property
    def use(self) -> int:
        """Where in the graph the fused kernel will run."""
        return self.facts.order[self.node]

    @property
    def read(self) -> int:
        """Where in the graph the product reads its factors."""
        return self.facts.order[self.product.node]

    def reader(self, pair: frozenset[Expr] = frozenset(), leaves: frozenset[fx.Node] = frozenset()) -> Reader:
        return Reader(self.facts, self.use, dict(self.extents), leaves, pair)

    def over(self, more: Mapping[Expr, Expr]) -> Frame:
        """The same with further indices."""
        return replace(self, extents={**self.extents, **more})

    @property
    def rows(self) -> frozenset[Expr]:
        """The indices of the result that the values do not have: those of queries, and heads that share values."""
        return free(*self.weights_at) - free(*self.values_at) - {self.c}

    @property
    def e(self) -> Index | None:
        """The index of a value's components: the innermost of those that only the values have."""
        own = set(self.out) - free(*self.weights_at)
        found = [x for x in self.values_at if x in own and isinstance(x, Index)]
        return found[-1] if found else None

    def parts(self, found: Product, score: Expr, *, half: fx.Node, empty: Empty) -> Parts:
        """The attention of `score` over the product of queries and keys that was `found` in it; `half` is the tensor
        whose dtype says whether the lowest number of float16 is a mask."""
        f = self.facts
        d, depth = found.contracted
        inner = {**self.extents, d: depth}
        e, i = self.e, found.row
        alone = free(*found.q_at) - free(*found.k_at) - {d}
        if found.row is not None and alone - set(self.out) and found.row not in alone:
            raise Unreadable(self.product.node, because("mixed-over-queries"))
        whole = frozenset[Expr](x for x in (i, self.c, d, e) if x is not None)

        def source(n: fx.Node, at: Point, read: int) -> Source:
            return operand(f, n, at, inner, read=read, use=self.use, whole=whole)

        read = f.order[found.node]
        return Parts(
            facts=f, out=self.out, out_shape=self.shape, i=i, j=self.c, d=d, e=e, extents=inner,
            q=source(found.q, found.q_at, read), k=source(found.k, found.k_at, read),
            v=source(self.values, self.values_at, self.read), score=score, product_dtype=f.dtype(found.node),
            dtype=f.dtype(self.node), half=f.dtype(half) == torch.float16, empty=empty,
        )  # fmt: skip


def frame(f: Facts, product: Contraction, *, left: bool) -> Frame:
    """The frame of a product whose `left` (or right) factor are the weights."""
    shape = f.shape(product.node)
    out = tuple(ZERO if s is ONE else Index(f"o{d}") for d, s in enumerate(shape))
    extents: dict[Expr, Expr] = {x: s for x, s in zip(out, shape, strict=True) if x is not ZERO}
    return framed(f, product.node, product, out, shape, extents, out, left=left)


def framed(
    f: Facts, node: fx.Node, product: Contraction, out: Point, shape: tuple[Expr, ...], extents: dict[Expr, Expr],
    at: Point, *, left: bool,
) -> Frame:  # fmt: skip
    """The frame of `node`, which is the product read at `at`."""
    c = Index("c")
    ours, theirs = product.maps(at, c) if left else reversed(product.maps(at, c))
    weights, values = (product.lhs, product.rhs) if left else (product.rhs, product.lhs)
    return Frame(
        f, node, product, out, shape, c, extents | {c: product.extent}, weights, tuple(ours), values, tuple(theirs)
    )
