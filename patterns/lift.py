"""Lifting: from an anchor and the product that consumes it to an `Attention`, or to the reason why there is none."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from attncc.ir.affine import linear_in, poly
from attncc.ir.attention import S, W
from attncc.ir.build import ONE, TRUE, ZERO, const, sub
from attncc.ir.expr import Const, Expr, Index, Load, Op, free, loads, rewrite
from attncc.ir.verify import VerifyError
from attncc.patterns.anchors import SDPA, Anchor, anchors, near_misses
from attncc.patterns.assemble import Lifted, Parts, assemble
from attncc.patterns.contractions import DOT, Contraction, contraction
from attncc.patterns.elements import ELEMENTS
from attncc.patterns.facts import Facts
from attncc.patterns.flex import FLEX, lift_flex
from attncc.patterns.guards import unguarded, vanishes
from attncc.patterns.moves import Point, move
from attncc.patterns.operands import Source, operand
from attncc.patterns.products import mentioned, products, stored
from attncc.patterns.sdpa import lift_sdpa
from attncc.patterns.unnormalised import lift_unnormalised, weighted_by_scores
from attncc.patterns.value import Reader, Unreadable


@dataclass(frozen=True)
class Refusal:
    """A softmax-like site that is left alone, and why."""

    reason: str
    node: fx.Node
    anchor: fx.Node


#: Operations that hold an attention and do not show it.
_LIBRARY = {
    "aten._transformer_encoder_layer_fwd.default", "aten._native_multi_head_attention.default",
}  # fmt: skip


class _Refused(Exception):
    def __init__(self, reason: str, node: fx.Node) -> None:
        super().__init__(reason)
        self.reason, self.node = reason, node


def lift_all(f: Facts) -> list[Lifted | Refusal]:
    """Every softmax-like site of the graph, in order."""
    found: list[Lifted | Refusal] = []
    for anchor in anchors(f):
        found += _guarded(f, anchor)
    for n in f.graph.nodes:
        if n.target is SDPA or n.target is FLEX:
            try:
                site = lift_sdpa(f, n) if n.target is SDPA else lift_flex(f, n)
                found += [] if site is None else [site]
            except Unreadable as error:
                found.append(Refusal(error.reason, error.node, n))
            except VerifyError as error:
                found.append(Refusal(f"the IR cannot say it: {error}", n, n))
        elif n.op == "call_function" and str(n.target) in _LIBRARY:
            found.append(Refusal("one library operation holds the whole attention, on nested tensors", n, n))
    taken = {site.node for site in found}
    for n in f.graph.nodes:
        weighted = weighted_by_scores(f, n) if n not in taken and n in f.live else None
        if weighted is not None:
            found += _without_softmax(f, n, *weighted)
    for n in near_misses(f):
        used = {product.node for product, _ in _consumers(f, n)[0]} | {n}
        if used.isdisjoint({site.node for site in found} | {site.anchor for site in found}):
            found.append(Refusal("a quotient by a sum that is not that of the same exponentials over the keys", n, n))
    return sorted(found, key=lambda site: f.order[site.anchor])


def _without_softmax(f: Facts, n: fx.Node, product: Contraction, left: bool) -> list[Lifted | Refusal]:
    try:
        site = lift_unnormalised(f, product, left)
    except (Unreadable, VerifyError) as error:
        return [Refusal(f"attention without a softmax: {error}", n, n)]
    return [] if site is None else [site]


def _guarded(f: Facts, anchor: Anchor) -> list[Lifted | Refusal]:
    try:
        uses, escapes = _consumers(f, anchor.node)
        if not uses:
            at = escapes[0] if escapes else anchor.node
            return [Refusal(f"the softmax is not multiplied with values: it goes to {_name(at)}", at, anchor.node)]
        if len(uses) > 1:
            escapes = [*escapes, *(c.node for c, _ in uses[1:])]
        product, left = uses[0]
        return [_lift(f, anchor, product, left, tuple(escapes))]
    except (_Refused, Unreadable) as error:
        return [Refusal(error.reason, error.node, anchor.node)]
    except VerifyError as error:
        return [Refusal(f"the IR cannot say it: {error}", anchor.node, anchor.node)]


def _name(n: fx.Node) -> str:
    if n.op == "output":
        return "the output"
    packet = getattr(n.target, "_overloadpacket", None)
    return str(packet).removeprefix("aten.") if packet is not None else n.name


def _consumers(f: Facts, anchor: fx.Node) -> tuple[list[tuple[Contraction, bool]], list[fx.Node]]:
    """Products that sum over the weights (and whether these are their left factor), and all other users."""
    products: list[tuple[Contraction, bool]] = []
    escapes: list[fx.Node] = []
    seen: set[fx.Node] = {anchor}
    stack = [anchor]
    while stack:
        n = stack.pop(0)
        for user in n.users:
            if user in seen or user not in f.live:
                continue
            product = contraction(f, user)
            if product is not None and n in (product.lhs, product.rhs):
                products.append((product, n is product.lhs))
                seen.add(user)
            elif _carries(f, user, n):
                seen.add(user)
                stack.append(user)
            elif user not in escapes and not _is_size(user):
                escapes.append(user)
    return sorted(products, key=lambda p: f.order[p[0].node]), escapes


def _carries(f: Facts, user: fx.Node, n: fx.Node) -> bool:
    """Whether `user` holds the values of `n`, moved or changed element by element."""
    if getattr(user.target, "__name__", "") in ("split", "split_with_sizes", "chunk", "unbind"):
        return True
    return user.op == "call_function" and f.is_tensor(user) and (_moves(f, user, n) or user.target in ELEMENTS)


def _moves(f: Facts, user: fx.Node, n: fx.Node) -> bool:
    extents = {Index(f"x{d}"): s for d, s in enumerate(f.shape(user))}
    moved = move(f, user, tuple(extents), extents)  # type: ignore[arg-type]
    return moved is not None


def _is_size(n: fx.Node) -> bool:
    return not isinstance(n.meta.get("val"), torch.Tensor | list | tuple) and n.op != "output"


def _lift(f: Facts, anchor: Anchor, product: Contraction, left: bool, escapes: tuple[fx.Node, ...]) -> Lifted:
    use = f.order[product.node]
    if product.bias is not None or product.alpha != 1.0:
        raise _Refused("the product with the values also scales or adds", product.node)
    if f.shape(anchor.scores)[anchor.dim] is ONE:
        raise _Refused("a softmax over a single key is always 1", anchor.node)
    shape = f.shape(product.node)
    out = tuple(ZERO if s is ONE else Index(f"o{d}") for d, s in enumerate(shape))
    c = Index("c")
    extents: dict[Expr, Expr] = {x: s for x, s in zip(out, shape, strict=True) if x is not ZERO}
    extents[c] = product.extent
    ours, theirs = product.maps(out, c) if left else reversed(product.maps(out, c))
    weights, values = (product.lhs, product.rhs) if left else (product.rhs, product.lhs)
    weight = Reader(f, use, extents, frozenset({anchor.node})).value_at(weights, tuple(ours), use)
    at = _anchor_point(f, anchor, weight)
    scores = f.shape(anchor.scores)
    offset = _softmax_offset(f, anchor, at, c)
    score, dot, i = _score(f, anchor, at, c, extents, use)
    sink = None
    if poly(scores[anchor.dim]) != poly(product.extent):
        sink = _sink(f, anchor, at, offset, c, extents, use, product.extent)
    rows = mentioned(at)
    value_axes = [x for x in out if x is not ZERO and x not in rows]
    if len(value_axes) > 1:
        raise _Refused("the values have several axes of their own", product.node)
    e = value_axes[0] if value_axes else None
    weight = rewrite(weight, lambda x: _w(x, anchor.node) or stored(f, x, use))
    bare = unguarded(f, Reader(f, use, extents), weight, score, c)
    read = f.order[product.node]
    v = operand(f, values, tuple(theirs), extents, read=read, use=use)
    q, k, d, product_dtype = dot
    parts = Parts(
        facts=f, out=out, out_shape=shape, i=None if i is ZERO else i, j=c, d=d[0], e=e,
        extents=extents | {d[0]: d[1]}, q=q, k=k, v=v, score=score, sink=sink,
        weight=weight if bare is None else bare, product_dtype=product_dtype,
        dtype=f.dtype(product.node), half=f.dtype(anchor.scores) == torch.float16,
        empty="zero" if bare is not None else anchor.empty or "nan", normalizer=anchor.normalizer,
    )  # fmt: skip
    site = assemble(parts, product.node, anchor.node, escapes)
    if site.attention.mask is not TRUE and not vanishes(parts.weight):
        raise _Refused("keys that the mask hides are given weight after the softmax", product.node)
    return site


def _w(x: Expr, anchor: fx.Node) -> Expr | None:
    return W if isinstance(x, Load) and x.tensor == anchor.name else None


def _anchor_point(f: Facts, anchor: Anchor, weight: Expr) -> Point:
    """The index of the softmax that the weights are read at."""
    points = {x.index for x in loads(weight) if x.tensor == anchor.node.name}
    read = [f.by_name[x.tensor.removeprefix(DOT)] for x in loads(weight)]
    if any(n.target is torch.ops.aten.dropout.default for n in read):
        raise _Refused("dropout is on", anchor.node)
    if len(points) != 1:
        reason = "the weights combine several softmax rows" if points else "the weights do not come from the softmax"
        raise _Refused(reason, anchor.node)
    return next(iter(points))


def _softmax_offset(f: Facts, anchor: Anchor, at: Point, c: Index) -> Expr:
    """o, where the softmax is read at c + o along its own axis."""
    for d, x in enumerate(at):
        if d != anchor.dim and c in free(x):
            raise _Refused("the softmax runs over another axis than the product sums over", anchor.node)
    line = linear_in(at[anchor.dim], c)
    if line is None or line[0] != {(): 1} or any(m for m in line[1]):
        raise _Refused("the softmax runs over another axis than the product sums over", anchor.node)
    return const(line[1].get((), 0))


Dot = tuple[Source, Source, tuple[Index, Expr], torch.dtype]


def _score(
    f: Facts, anchor: Anchor, at: Point, c: Index, extents: dict[Expr, Expr], use: int
) -> tuple[Expr, Dot, Expr]:
    """The score with the product of queries and keys as `s`, its operands, and the query index."""
    when = anchor.read_at(f)
    rough = Reader(f, use, extents, pair=frozenset({c})).value_at(anchor.scores, at, when)
    found = next(iter(products(f, rough, c, mentioned(at))), None)
    if found is None:
        raise _Refused("the softmax's input is no product of queries and keys", anchor.scores)
    i = max(found.rows, key=lambda x: x.name) if found.rows else ZERO
    score = Reader(f, use, extents, pair=frozenset({c, i})).value_at(anchor.scores, at, when) if found.rows else rough
    score = _without(score, anchor.invariant)
    score = rewrite(score, lambda x: S if x is found.load else stored(f, x, use))
    read, inner = f.order[found.node], extents | {found.contracted[0]: found.contracted[1]}
    q = operand(f, found.q, found.q_at, inner, read=read, use=use)
    k = operand(f, found.k, found.k_at, inner, read=read, use=use)
    return score, (q, k, found.contracted, f.dtype(found.node)), i


def _without(score: Expr, invariant: frozenset[fx.Node]) -> Expr:
    """The score less the row constants that cancel in the quotient."""
    names = {n.name for n in invariant}

    def rule(x: Expr) -> Expr | None:
        if isinstance(x, Op) and x.name == "sub" and isinstance(x.args[1], Load) and x.args[1].tensor in names:
            return x.args[0]
        return None

    return rewrite(score, rule) if names else score


def _sink(
    f: Facts, anchor: Anchor, at: Point, offset: Expr, c: Index, extents: dict[Expr, Expr], use: int, keys: Expr
) -> Expr:
    """The logit of the one softmax column that no value belongs to."""
    columns = f.shape(anchor.scores)[anchor.dim]
    if poly(sub(columns, keys)) != {(): 1} or not isinstance(offset, Const) or offset.value not in (0, 1):
        raise _Refused("the softmax covers other keys than the product sums over", anchor.node)
    column = keys if offset.value == 0 else ZERO
    point = tuple(column if d == anchor.dim else x for d, x in enumerate(at))
    value = Reader(f, use, extents).value_at(anchor.scores, point, anchor.read_at(f))
    value = _without(value, anchor.invariant)
    if c in free(value) or any(x.tensor.startswith(DOT) for x in loads(value)):
        raise _Refused("the softmax covers other keys than the product sums over", anchor.node)
    return value


