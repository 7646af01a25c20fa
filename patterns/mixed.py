"""Scores that are mixed over heads before their softmax are one product, over heads and components together:

    sum_g mix[h, g] * (sum_d q[g, i, d] * k[g, j, d])  =  sum_(g, d) (mix[h, g] * q[g, i, d]) * k[g, j, d]

The queries of all heads, scaled, are a tensor of their own; the keys are read as they lie, or copied.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from attncc.ir.attention import S
from attncc.ir.build import add, floordiv, mod, mul
from attncc.ir.expr import ROUNDINGS, Const, Expr, Index, Load, Op, loads, substitute
from attncc.patterns.contractions import DOT, mixture
from attncc.patterns.elements import operand
from attncc.patterns.frames import Frame
from attncc.patterns.made import summed
from attncc.patterns.moves import Point
from attncc.patterns.products import Product, mentioned, products


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
        scaled = _factors(reader.value_at(mix.lhs, left, f.order[n]))
        scaled += _factors(reader.value_at(mix.rhs, right, f.order[n]))
        dots = [y for y in scaled if isinstance(y, Load) and y.tensor.startswith(DOT)]
        if len(dots) != 1:
            continue
        inner = next(products(f, dots[0], c, frame.rows), None)
        rest = [y for y in scaled if y is not dots[0]]
        if inner is None or any(c in mentioned((y,)) for y in rest):
            continue
        found = _joined(frame, x, inner, rest, g, mix.extent)
        if found is None:
            continue
        if mix.bias is not None:
            bias = operand(reader, n, mix.bias, mix.added(x.index))
            found = None if bias is None else replace(found, value=add(found.value, bias))
        return found
    return None


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
