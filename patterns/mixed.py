"""Scores that are mixed over heads before their softmax are one product, over heads and components together:

    sum_g mix[h, g] * (sum_d q[g, i, d] * k[g, j, d])  =  sum_(g, d) (mix[h, g] * q[g, i, d]) * k[g, j, d]

The queries of all heads, scaled, are a tensor of their own; the keys are read as they lie, or copied. A bias that is
added before is mixed by itself: it has the size of scores, but usually no batch.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from attncc.ir.attention import S
from attncc.ir.build import add, floordiv, mod, mul
from attncc.ir.expr import ROUNDINGS, Const, Expr, Index, Load, Op, loads, substitute
from attncc.patterns.contractions import DOT, mixture
from attncc.patterns.elements import operand
from attncc.patterns.facts import Facts
from attncc.patterns.frames import Frame
from attncc.patterns.made import einsum, summed
from attncc.patterns.moves import Point, broadcast
from attncc.patterns.products import Product, mentioned, products
from attncc.patterns.schema import argument
from attncc.patterns.value import Reader

aten = torch.ops.aten


def mixed_product(frame: Frame, score: Expr) -> Product | None:
    """The product of queries and keys that a mixture of scores over heads is, None if the score holds none."""
    f, c = frame.facts, frame.c
    for x in loads(score):
        n = f.by_name[x.tensor.removeprefix(DOT)]
        mix = mixture(f, n) if c in mentioned(x.index) else None
        if mix is None:
            continue
        g = Index("g")
        left, right = mix.maps(x.index, g)
        reader = frame.over({g: mix.extent}).reader()
        scores, at, biases = _without_biases(reader, mix.lhs, left)
        scaled = _factors(reader.value_at(scores, at, f.order[n]))
        scaled += _factors(reader.value_at(mix.rhs, right, f.order[n]))
        dots = [y for y in scaled if isinstance(y, Load) and y.tensor.startswith(DOT)]
        if len(dots) != 1:
            continue
        inner = next(products(f, dots[0], c, frame.rows), None)
        rest = [y for y in scaled if y is not dots[0]]
        if inner is None or any(c in mentioned((y,)) for y in rest):
            continue
        found = _joined(frame, x, inner, rest, g, mix.extent)
        for bias in biases:
            mixed = None if found is None else _mixed_bias(f, (mix.rhs, right), bias, g, frame.use)
            found = None if found is None or mixed is None else replace(found, value=add(found.value, mixed))
        if found is None:
            continue
        if mix.bias is not None:
            bias = operand(reader, n, mix.bias, mix.added(x.index))
            found = None if bias is None else replace(found, value=add(found.value, bias))
        return found
    return None


def _without_biases(r: Reader, n: fx.Node, at: Point) -> tuple[fx.Node, Point, list[tuple[fx.Node, Point]]]:
    """Scores at a point less the tensors that are added to their product, and these."""
    f = r.facts
    found: list[tuple[fx.Node, Point]] = []
    while n.target is aten.add.Tensor and argument(n, "alpha") == 1 and all(f.is_tensor(x) for x in n.args):
        sides: list[tuple[fx.Node, Point]] = [(x, broadcast(f, x, at)) for x in n.all_input_nodes]
        held = [any(y.tensor.startswith(DOT) for y in loads(r.value_at(x, p, f.order[n]))) for x, p in sides]
        if sorted(held) != [False, True]:
            break
        found.append(sides[held.index(False)])
        n, at = sides[held.index(True)]
    return n, at, found


def _mixed_bias(
    f: Facts, mix: tuple[fx.Node, Point], bias: tuple[fx.Node, Point], g: Index, use: int
) -> Expr | None:  # fmt: skip
    """What a mixture adds to its scores for a bias that they had before."""
    out = list(dict.fromkeys(x for _, at in (bias, mix) for x in at if isinstance(x, Index) and x is not g))
    written = any(f.writes(n, f.order[n], use) for n, _ in (mix, bias))
    n = None if written else einsum(f, [mix, bias], out, use)
    return None if n is None else Load(n.name, tuple(out), "float")


def _factors(x: Expr) -> list[Expr]:
    match x:
        case Op("mul", (a, b)):
            return [*_factors(a), *_factors(b)]
        case Op("div", (a, Const(b))):
            return [*_factors(a), Const(1.0 / b)]
        case Op(name, (a,)) if name in ROUNDINGS:
            return _factors(a)
        case _:
            return [x]


def _joined(frame: Frame, x: Load, inner: Product, rest: list[Expr], g: Index, heads: Expr) -> Product | None:
    """The product over heads `g` and components together, `rest` being what multiplies it."""
    f, (d, depth) = frame.facts, inner.contracted
    scale: Expr = Const(1.0)
    factors: list[tuple[fx.Node, Point]] = [(inner.q, inner.q_at)]
    for y in rest:
        if isinstance(y, Const):
            scale = mul(scale, y)
        elif isinstance(y, Load) and not y.tensor.startswith(DOT):
            factors.insert(0, (f.by_name[y.tensor], y.index))
        else:
            return None
    alike = {f.dtype(n) for n, _ in factors} == {f.value(inner.q).dtype}
    if not alike or f.writes(inner.q, f.order[inner.node] - 1, frame.use):
        return None
    indices = dict.fromkeys(i for _, at in reversed(factors) for i in at if isinstance(i, Index))
    if g not in indices:
        return None
    joined = Index("gd")
    together = [i for i in (g, d) if i in indices]
    q = summed(f, factors, [i for i in indices if i not in together], together, joined, frame.use)
    if q is None:
        return None
    digits: dict[Expr, Expr] = {g: floordiv(joined, depth), d: mod(joined, depth)}
    k_at = tuple(substitute(i, digits) for i in inner.k_at)
    contracted = joined, mul(heads, depth)
    return Product(x, inner.node, q.node, q.at, inner.k, k_at, inner.row, contracted, mul(S, scale))
