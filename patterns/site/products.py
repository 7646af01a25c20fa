"""The product of queries and keys inside a score: found by which of its factors the keys' index reaches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from attncc.ir.affine import Extents
from attncc.ir.attention import S
from attncc.ir.build import TRUE
from attncc.ir.expr import Expr, Index, Load, free, loads
from attncc.ir.reasons import because
from attncc.patterns.site.reading import DOT, Facts, Place, Point, Unreadable, contraction


@dataclass(frozen=True)
class Product:
    """`load` is sum_d q[q_at] * k[k_at], computed by `node`; `row` is the index of the queries, where there is one.

    `value` is what the load holds, in terms of the score `s`."""

    load: Load
    node: fx.Node
    q: fx.Node
    q_at: Point
    k: fx.Node
    k_at: Point
    row: Index | None
    contracted: tuple[Index, Expr]
    value: Expr = S


def products_in(f: Facts, score: Expr, c: Index, rows: frozenset[Expr]) -> Iterator[Product]:
    """Products in the score that separate into queries and keys (index `c`), the first one first, those that only a
    mask compares last. `rows` are the indices that the values do not have."""
    d = Index("d")
    valued = _valued(score)
    for x in sorted(loads(score), key=lambda x: x not in valued):
        if not x.tensor.startswith(DOT) or c not in free(*x.index):
            continue
        node = f.by_name[x.tensor.removeprefix(DOT)]
        product = contraction(f, node)
        assert product is not None
        left, right = product.maps(x.index, d)
        sides = [(left, product.lhs), (right, product.rhs)]
        with_c = [c in free(*point) for point, _ in sides]
        if sum(with_c) != 1:
            continue
        (k_at, k), (q_at, q) = sides if with_c[0] else reversed(sides)
        apart = (rows - free(*k_at)) & free(*q_at) or rows - free(*k_at)
        own = [i for i in apart if isinstance(i, Index)]
        if rows and not own:
            continue  # keys of their own for each query: a mixture of scores, not a score
        row = max(own, key=lambda x: x.name) if own else None
        yield Product(x, node, q, q_at, k, k_at, row, (d, product.extent))


def _valued(x: Expr) -> set[Expr]:
    """The loads of an expression that are not in its predicates alone."""
    found: set[Expr] = set()
    stack = [x]
    while stack:
        y = stack.pop()
        if isinstance(y, Load):
            found.add(y)
        stack += [] if isinstance(y, Load) else [z for z in y.children if z.kind != "bool"]
    return found


class Overwritten(Unreadable):
    """A product that does not hold any more what it was, since the model wrote to it; `by` was the last to do so."""

    def __init__(self, node: fx.Node, by: fx.Node) -> None:
        super().__init__(node, because("product-written"))
        self.by = by


def stored(f: Facts, x: Expr, use: int, ext: Extents) -> Expr | None:
    """A product that is not the site's own, as a load of what the model computes anyway: inside of its tensor also
    where a selection around it takes another branch."""
    if not isinstance(x, Load) or not x.tensor.startswith(DOT):
        return None
    n = f.by_name[x.tensor.removeprefix(DOT)]
    product = contraction(f, n)
    if product is None or product.bias is not None or product.alpha != 1.0:
        raise Unreadable(n, because("second-product"))
    writes = f.writes(n, f.order[n], use)
    if writes:
        raise Overwritten(n, writes[-1])
    return Load(n.name, Place(TRUE, x.index).kept(f.shape(n), ext), "float")
