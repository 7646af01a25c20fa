"""`scaled_dot_product_attention` says what it is; only its mask has to be read."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from attncc.ir.affine import divide, poly
from attncc.ir.attention import S, W
from attncc.ir.build import ONE, TRUE, ZERO, add, and_, cast, const, floordiv, le, mul, op
from attncc.ir.expr import Const, Expr, Index, rewrite
from attncc.ir.reasons import because
from attncc.patterns.site import (
    Facts,
    Lifted,
    Parts,
    Point,
    Reader,
    Source,
    Unreadable,
    argument,
    assembled,
    broadcast,
    fitted,
    has_argument,
    keeps,
    number,
    operand,
    stored,
    words_at,
)


def lift_sdpa(f: Facts, n: fx.Node) -> Lifted:
    """The attention of an SDPA call. Raises Unreadable with the reason where the IR cannot say it."""
    q, k, v, mask = (argument(n, name) for name in ("query", "key", "value", "attn_mask"))
    words = argument(n, "words") if has_argument(n, "words") else None
    if words is None and argument(n, "dropout_p") != 0.0:
        raise Unreadable(n, because("dropout"))
    shape = f.shape(n)
    rank = len(shape)
    if f.rank(q) < 2 or any(f.rank(x) != rank for x in (q, k, v)):
        raise Unreadable(n, because("ranks"))
    out = tuple(ZERO if s is ONE else Index(f"o{d}") for d, s in enumerate(shape))
    j, d = Index("c"), Index("d")
    use = f.order[n]
    extents: dict[Expr, Expr] = {x: s for x, s in zip(out, shape, strict=True) if x is not ZERO}
    extents |= {j: f.shape(k)[-2], d: f.shape(q)[-1]}
    batch, i, e = out[:-2], out[-2], out[-1]

    def source(x: Any, *own: Expr) -> Source:
        point = (*_heads(f, n, x, batch, extents), *own)
        return operand(f, x, point, extents, read=use, use=use, whole=frozenset({i, j, d, e}))

    score, predicate = mul(S, _scale(f, n, q)), TRUE
    if argument(n, "is_causal"):
        predicate = le(j, i)
    if mask is not None:
        value = Reader(f, use, extents, pair=frozenset({i, j})).value_at(mask, broadcast(f, mask, (*batch, i, j)), use)
        value = stored_in(f, value, use, extents)
        if value.kind == "bool":
            predicate = and_(predicate, value)
        else:
            score = add(score, cast(value, "float"))
    weight: Expr = W
    if words is not None:
        own = words_at(Reader(f, use, extents), words, (*batch, i), use)
        row: tuple[Expr, Expr] = (stored_in(f, own[0], use, extents), stored_in(f, own[1], use, extents))
        weight = mul(W, keeps(row, j, argument(n, "dropout_p")))
    parts = Parts(
        facts=f, out=out, out_shape=shape, i=None if i is ZERO else i, j=j, d=d, e=None if e is ZERO else e,
        extents=extents, q=source(q, i, d), k=source(k, j, d), v=source(v, j, e), score=score,
        product_dtype=f.dtype(n), dtype=f.dtype(n), half=f.dtype(n) == torch.float16, empty="zero",
        mask=predicate, weight=weight,
    )  # fmt: skip
    return assembled(parts, n, n)


def stored_in(f: Facts, x: Expr, use: int, extents: dict[Expr, Expr]) -> Expr:
    """`x`, whose loads are of tensors that are there when the attention runs."""
    return rewrite(x, lambda y: stored(f, y, use, extents))


def _scale(f: Facts, n: fx.Node, q: fx.Node) -> Expr:
    scale = argument(n, "scale")
    if scale is None:
        width = f.shape(q)[-1]
        return const(float(width.value) ** -0.5) if isinstance(width, Const) else op("rsqrt", cast(width, "float"))
    known = number(f, scale, n)
    if known is None:
        raise Unreadable(n, because("unknown-scale"))
    return cast(known, "float")


def _heads(f: Facts, n: fx.Node, x: fx.Node, batch: Point, extents: dict[Expr, Expr]) -> Point:
    """Batch indices of a factor: broadcast ones are zero, grouped heads share."""
    shape = f.shape(x)[:-2]
    at = list(fitted(shape, batch))
    if argument(n, "enable_gqa") and at and batch[-1] is not ZERO:
        heads, own = extents[batch[-1]], shape[-1]
        if poly(heads) != poly(own):  # torch demands that one number divides the other
            group, rest = divide(heads, own, {})
            group = group if rest is ZERO else floordiv(heads, own)
            at[-1] = divide(batch[-1], group, extents)[0] if isinstance(group, Const) else floordiv(batch[-1], group)
    return tuple(at)
