"""Random mask terms: what models hide, each a predicate over the indices, sizes and loads."""

from __future__ import annotations

from collections.abc import Callable

from attncc.ir import Expr, Index
from attncc.ir.build import add, and_, const, eq, floordiv, ge, gt, le, lt, mod, not_, op, or_, sub
from random_ir.shop import Shop

Term = Callable[[Shop], Expr]
ROW, KEY = Index("i"), Index("j")


def causal(shop: Shop) -> Expr:
    return le(KEY, ROW)


def causal_from_the_end(shop: Shop) -> Expr:
    """The last row sees the last key: j <= i + M - N."""
    return le(KEY, add(ROW, sub(shop.extents["j"].expr, shop.extents["i"].expr)))


def window(shop: Shop) -> Expr:
    return lt(sub(ROW, KEY), const(shop.integer(0, 9)))


def symmetric_window(shop: Shop) -> Expr:
    return le(op("abs", sub(ROW, KEY)), const(shop.integer(0, 9)))


def chunk(shop: Shop) -> Expr:
    width = const(shop.integer(1, 9))
    return eq(floordiv(ROW, width), floordiv(KEY, width))


def dilated(shop: Shop) -> Expr:
    return eq(mod(sub(ROW, KEY), const(shop.integer(1, 4))), const(0))


def every_other_head(shop: Shop) -> Expr:
    return eq(mod(add(KEY, Index("h")), const(2)), const(0)) if shop.has("h") else eq(mod(KEY, const(2)), const(0))


def documents(shop: Shop) -> Expr:
    axes = ["b"] if shop.has("b") else []
    dtype = shop.pick("i64", "i32")
    return eq(shop.load("row_doc", [*axes, "i"], dtype, 0, 2), shop.load("key_doc", [*axes, "j"], dtype, 0, 2))


def padding(shop: Shop) -> Expr:
    return shop.load("pad", [*(["b"] if shop.has("b") else []), "j"], "bool")


def lengths(shop: Shop) -> Expr:
    """Some are 0, so some rows are empty."""
    return lt(KEY, shop.load("lengths", ["b"] if shop.has("b") else [], "i32", 0, shop.extents["j"].value))


def prefix(shop: Shop) -> Expr:
    length = shop.size(f"P{len(shop.sizes)}", shop.integer(0, 9)).expr if shop.pick(False, True) else const(3)
    return or_(lt(KEY, length), le(KEY, ROW))


def dense(shop: Shop) -> Expr:
    return shop.load("visible", [*shop.batch_axes(), "i", "j"], "bool")


def threshold(shop: Shop) -> Expr:
    return gt(shop.load("relevance", [*shop.batch_axes(), "j"], "f32"), const(-0.5))


def later_rows_only(shop: Shop) -> Expr:
    """Hides whole rows."""
    return ge(ROW, const(shop.integer(0, 5)))


def sink_and_recent(shop: Shop) -> Expr:
    return and_(le(KEY, ROW), or_(lt(KEY, const(2)), lt(sub(ROW, KEY), const(4))))


def hole(shop: Shop) -> Expr:
    return not_(and_(ge(KEY, const(2)), lt(KEY, const(shop.integer(2, 20)))))


TERMS: tuple[Term, ...] = (
    causal, window, padding, causal_from_the_end, symmetric_window, chunk, dilated, every_other_head, documents,
    lengths, prefix, dense, threshold, later_rows_only, sink_and_recent, hole,
)  # fmt: skip


def mask_terms(shop: Shop, most: int = 2) -> list[Expr]:
    return [term(shop) for term in shop.some(TERMS, most)]
