"""Random pieces of scores, sinks and weights. Each takes the expression so far and gives the next."""

from __future__ import annotations

from collections.abc import Callable

from attncc.ir import Expr, Index, Load
from attncc.ir.build import add, and_, cast, const, maximum, minimum, mul, op, sub, where
from random_ir.masks import mask_terms
from random_ir.shop import Shop, const_dim, minus, plus

Piece = Callable[[Shop, Expr], Expr]
ROW, KEY = Index("i"), Index("j")


def bias(shop: Shop, x: Expr) -> Expr:
    axes = [*shop.batch_axes(), *shop.pick(("i", "j"), ("j",), ("i",))]
    return add(x, shop.load("bias", axes, shop.pick("f32", "bf16", "f64")))


def offset_bias(shop: Shop, x: Expr) -> Expr:
    """A bias that depends on the distance alone: bias[h, j - i + N - 1]."""
    rows, keys = shop.extents["i"], shop.extents["j"]
    distances = minus(plus(rows, keys), const_dim(1))
    axes = shop.batch_axes()
    name = shop.floats(shop.fresh("relative"), "f32", [*(shop.extents[a] for a in axes), distances])
    index = add(sub(KEY, ROW), minus(rows, const_dim(1)).expr)
    return add(x, Load(name, (*(Index(a) for a in axes), index), "float"))


def clamped_table(shop: Shop, x: Expr) -> Expr:
    """A bucketed bias: table[clamp(i - j, -3, 4) + 3, h]."""
    axes = shop.batch_axes()
    name = shop.floats(shop.fresh("table"), "f32", [const_dim(8), *(shop.extents[a] for a in axes)])
    bucket = add(minimum(maximum(sub(ROW, KEY), const(-3)), const(4)), const(3))
    return add(x, Load(name, (bucket, *(Index(a) for a in axes)), "float"))


def gathered_bias(shop: Shop, x: Expr) -> Expr:
    """A bias looked up through an index tensor: table[index[i, j]]."""
    where_to = shop.load("index", ("i", "j"), shop.pick("i64", "i32"), 0, 6)
    name = shop.floats(shop.fresh("lookup"), "f32", [const_dim(7)])
    return add(x, Load(name, (where_to,), "float"))


def alibi(shop: Shop, x: Expr) -> Expr:
    slope: Expr = shop.load("slope", shop.batch_axes(), "f32")
    distance = shop.pick(sub(KEY, ROW), op("neg", op("abs", sub(ROW, KEY))))
    return add(x, mul(slope, mul(cast(distance, "float"), const(0.1))))


def softcap(shop: Shop, x: Expr) -> Expr:
    cap = shop.pick(2.0, 30.0)
    return mul(op("tanh", op("div", x, const(cap))), const(cap))


def key_scale(shop: Shop, x: Expr) -> Expr:
    return mul(x, shop.load("temperature", [*shop.batch_axes(), shop.pick("i", "j")], "f32"))


def rounded(shop: Shop, x: Expr) -> Expr:
    return op(shop.pick("f32", "bf16", "f16"), x)


def discounted(shop: Shop, x: Expr) -> Expr:
    """A choice inside the score that hides nothing."""
    return where(and_(*mask_terms(shop)), x, sub(mul(x, const(0.5)), const(1.0)))


SCORES: tuple[Piece, ...] = (
    bias, offset_bias, clamped_table, gathered_bias, alibi, softcap, key_scale, rounded, discounted,
)  # fmt: skip


def filled(shop: Shop, x: Expr) -> Expr:
    """The finite fill of a mask that is not a mask: rows where all is filled are uniform."""
    return where(and_(*mask_terms(shop)), x, const(-1e4)) if shop.pick(False, False, True) else x


def sinks(shop: Shop) -> Expr | None:
    """No sink, a constant one, or one learned per head, perhaps per row."""
    kind = shop.pick("none", "none", "constant", "loaded")
    if kind == "none":
        return None
    if kind == "constant":
        return const(0.5)
    return shop.load("sinks", [*shop.batch_axes(), *shop.pick((), ("i",))], "f32")


def gate(shop: Shop, w: Expr) -> Expr:
    return mul(w, shop.load("gate", [*shop.batch_axes(), *shop.pick(("i",), ("j",), ("i", "j"))], "f32"))


def dropped(shop: Shop, w: Expr) -> Expr:
    """Weights zeroed after normalising, as dropout does with a mask that is given."""
    return mul(where(shop.load("keep", ("i", "j"), "bool"), w, const(0.0)), const(1.25))


def squared(shop: Shop, w: Expr) -> Expr:
    return mul(w, w)


def rounded_weight(shop: Shop, w: Expr) -> Expr:
    return op("bf16", w)


WEIGHTS: tuple[Piece, ...] = (gate, dropped, squared, rounded_weight)
