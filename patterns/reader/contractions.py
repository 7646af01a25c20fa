"""Products of two tensors summed over a shared axis, in all their spellings: access maps of both factors."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import permutations
from typing import Any

import torch
from torch import fx

from attncc.ir.build import ONE, ZERO, add, cast, const, floordiv, mod, mul, op
from attncc.ir.expr import Const, Expr, Load
from attncc.patterns.reader.pointwise import input_at
from attncc.patterns.reader.rules import Facts, Point, Values, argument, asked_once, spelled_out
from attncc.patterns.reader.size_arithmetic import number
from attncc.patterns.reader.sums_of_products import written_out
from attncc.patterns.reader.view_ops import broadcast, fitted, unexpanded

aten = torch.ops.aten
Maps = Callable[[Point, Expr], tuple[Point, Point]]
DOT = "dot:"
ROUNDED = {torch.bfloat16: "bf16", torch.float16: "f16"}


@dataclass(frozen=True)
class Contraction:
    """`node[at] = alpha * sum_c lhs[maps(at, c)[0]] * rhs[maps(at, c)[1]] (+ beta * bias[at])`, c < extent."""

    node: fx.Node
    lhs: fx.Node
    rhs: fx.Node
    extent: Expr
    maps: Maps
    bias: fx.Node | None = None
    alpha: float | Expr = 1.0
    beta: float = 1.0
    bias_dim: int | None = None

    def added(self, at: Point) -> Point:
        """The point of a bias that is added: it broadcasts, or lies along one dimension."""
        return at if self.bias_dim is None else (at[self.bias_dim],)

    def value(self, r: Values, at: Point) -> Expr:
        """The expression at a point, with the bare product as a load named `dot:<node>`."""
        x: Expr = Load(DOT + self.node.name, at, "float")
        rounding = ROUNDED.get(r.facts.dtype(self.node))
        if self.alpha != 1.0:
            x = mul(x, self.alpha if isinstance(self.alpha, Expr) else const(float(self.alpha)))
        if self.bias is not None and self.beta != 0:
            bias = input_at(r, self.node, self.bias, self.added(at))
            assert bias is not None
            x = add(x, mul(cast(bias, "float"), const(float(self.beta))))
        return x if rounding is None else op(rounding, x)


@asked_once
def contraction(f: Facts, n: fx.Node) -> Contraction | None:
    """The product that `n` computes, or None if it is none (or one of shapes that the IR cannot say)."""
    rule = _RULES.get(n.target) if n.op == "call_function" else None
    return None if rule is None else rule(f, n)


def _matmul(f: Facts, n: fx.Node) -> Contraction | None:
    a: Any = n.args[0]
    b: Any = n.args[1]
    ra, rb = f.rank(a), f.rank(b)
    if ra == 0 or rb == 0 or (ra == 1 and rb == 1):
        return None

    def maps(at: Point, c: Expr) -> tuple[Point, Point]:
        tail = (ra > 1) + (rb > 1)
        batch, own = at[: len(at) - tail], at[len(at) - tail :]
        row = own[:1] if ra > 1 else ()
        column = own[-1:] if rb > 1 else ()
        left = (*fitted(f.shape(a)[:-2], batch), *row, c) if ra > 1 else (c,)
        right = (*fitted(f.shape(b)[:-2], batch), c, *column) if rb > 1 else (c,)
        return left, right

    return Contraction(n, a, b, f.shape(a)[-1], maps)


def _baddbmm(f: Facts, n: fx.Node) -> Contraction | None:
    bias: Any = n.args[0]
    a: Any = n.args[1]
    b: Any = n.args[2]
    alpha, beta = argument(n, "alpha"), argument(n, "beta")
    if isinstance(alpha, fx.Node):
        alpha = number(f, alpha, n)
    if not isinstance(alpha, int | float | Expr) or not isinstance(beta, int | float):
        return None

    def maps(at: Point, c: Expr) -> tuple[Point, Point]:
        return (*at[:-1], c), (*at[:-2], c, at[-1])

    return Contraction(n, a, b, f.shape(a)[-1], maps, bias, alpha, beta)


def _einsum(f: Facts, n: fx.Node) -> Contraction | None:
    equation: Any = n.args[0]
    factors: Any = n.args[1]
    letters = spelled_out(equation, *(f.rank(x) for x in factors))
    if len(factors) == 3:
        return _bilinear(f, n, factors, letters)
    if len(factors) != 2:
        return None
    a: Any = factors[0]
    b: Any = factors[1]
    return summed_pair(f, n, (a, b), letters)


def _bilinear(f: Facts, n: fx.Node, factors: Sequence[fx.Node], letters: Sequence[str]) -> Contraction | None:
    """A product of two tensors with learned weights between them: one of the two goes through the weights first."""
    *terms, out = letters
    for a, b in permutations(range(3), 2):
        rest = 3 - a - b
        kept = "".join(c for c in dict.fromkeys(terms[a] + terms[b]) if c in terms[rest] + out)
        inside = set(terms[a] + terms[b]) - set(kept)
        if factors[b] not in f.parameters or not inside & set(terms[a]) & set(terms[b]) or len(kept) > len(terms[a]):
            continue
        equation = f"{terms[a]},{terms[b]}->{kept}"
        through = f.make(aten.einsum.default, (equation, [factors[a], factors[b]]), f.order[n])
        return summed_pair(f, n, (through, factors[rest]), (kept, terms[rest], out))
    return None


def summed_pair(f: Facts, n: fx.Node, factors: tuple[fx.Node, fx.Node], letters: tuple[str, ...]) -> Contraction | None:
    """The sum over the letters that both factors have and the result (the last of `letters`) has not. A letter of one
    factor alone stands for its one element."""
    a, b = factors
    first, second, out = letters
    if len(set(first)) != len(first) or len(set(second)) != len(second):
        return None
    both = ((a, first, second), (b, second, first))
    lone = {
        c for x, own, other in both for c, s in zip(own, f.shape(x), strict=True) if s is ONE and c not in other + out
    }
    summed = [c for c in dict.fromkeys(first + second) if c not in out and c not in lone]
    if not summed or any(c not in first or c not in second for c in summed):
        return None
    sizes = [(f.shape(a)[first.index(c)], f.shape(b)[second.index(c)]) for c in summed]
    extents = [n if n is not ONE else m for n, m in sizes]

    def maps(at: Point, c: Expr) -> tuple[Point, Point]:
        where = dict(zip(out, at, strict=True)) | dict(zip(summed, _digits(c, extents), strict=True))
        where |= dict.fromkeys(lone, ZERO)
        return (
            broadcast(f, a, tuple(where[x] for x in first)),
            broadcast(f, b, tuple(where[x] for x in second)),
        )

    return Contraction(n, a, b, reduce(mul, extents), maps)


def _digits(x: Expr, extents: list[Expr]) -> list[Expr]:
    """The indices of the axes that are summed as one, the last one fastest."""
    found: list[Expr] = []
    for extent in reversed(extents[1:]):
        found.append(mod(x, extent))
        x = floordiv(x, extent)
    return [x, *reversed(found)]


def _summed(f: Facts, n: fx.Node) -> Contraction | None:
    """A sum of products over one dimension, written out."""
    w = written_out(f, n)
    if w is None or w.squared:
        return None
    a, b = w.factors

    def maps(at: Point, c: Expr) -> tuple[Point, Point]:
        inside = (*at[: w.dim], c, *at[w.dim + w.kept :])
        return a.at(inside), b.at(inside)

    return Contraction(n, a.node, b.node, w.extent, maps, alpha=w.scale)


def _cosine(f: Facts, n: fx.Node) -> Contraction | None:
    """A product of rows that are divided by their lengths first."""
    eps, rank = argument(n, "eps"), f.rank(n) + 1
    dim: int = argument(n, "dim") % rank
    units: list[fx.Node] = []
    spans: list[set[int]] = []
    for given in n.args[:2]:
        x = unexpanded(f, given)  # type: ignore[arg-type]
        at = dim - rank + f.rank(x)
        if at < 0 or f.shape(x)[at] is ONE:
            return None
        key = ("unit", x, at, eps, None if x in f.unwritten else n)
        units.append(f.make_once(key, partial(_unit, f, x, at, eps, f.order[n])))
        spans.append({d - f.rank(x) for d, s in enumerate(f.shape(x)) if s is not ONE})
    if spans[0] == spans[1]:
        return None  # one number a row: no row meets other rows

    def maps(at: Point, c: Expr) -> tuple[Point, Point]:
        inside = (*at[:dim], c, *at[dim:])
        left, right = (broadcast(f, x, inside) for x in units)
        return left, right

    return Contraction(n, units[0], units[1], f.shape(units[0])[dim - rank], maps)


def _unit(f: Facts, x: fx.Node, dim: int, eps: float, at: int) -> fx.Node:
    """Rows divided by their lengths."""
    length = f.make(aten.linalg_vector_norm.default, (x, 2, [dim], True), at)
    length = f.make(aten.clamp_min.default, (length, eps), at)
    return f.make(aten.div.Tensor, (x, length), at)


def _inner(f: Facts, n: fx.Node) -> Contraction | None:
    a: Any = n.args[0]
    b: Any = n.args[1]
    ra = f.rank(a)
    if ra == 0 or f.rank(b) == 0 or ra == f.rank(b) == 1:
        return None

    def maps(at: Point, c: Expr) -> tuple[Point, Point]:
        return (*at[: ra - 1], c), (*at[ra - 1 :], c)

    return Contraction(n, a, b, f.shape(a)[-1], maps)


def _vecdot(f: Facts, n: fx.Node) -> Contraction | None:
    a: Any = n.args[0]
    b: Any = n.args[1]
    dim: Any = argument(n, "dim")
    rank = f.rank(n) + 1
    if f.value(n).is_complex() or f.shape(a) == f.shape(b):
        return None
    dim %= rank

    def maps(at: Point, c: Expr) -> tuple[Point, Point]:
        inside = (*at[:dim], c, *at[dim:])
        return broadcast(f, a, inside), broadcast(f, b, inside)

    extents: list[Expr] = [f.shape(x)[dim - rank] for x in (a, b) if f.rank(x) >= rank - dim]
    return Contraction(n, a, b, extents[0], maps) if len(extents) == 2 and extents[0] is extents[1] else None


def _tensordot(f: Facts, n: fx.Node) -> Contraction | None:
    a: Any = n.args[0]
    b: Any = n.args[1]
    pairs: Any = n.args[2:4]
    first, second = ([d % f.rank(x) for d in dims] for x, dims in zip((a, b), pairs, strict=True))
    letters = iter(string.ascii_letters)
    left, right = [next(letters) for _ in range(f.rank(a))], [next(letters) for _ in range(f.rank(b))]
    for x, y in zip(first, second, strict=True):
        right[y] = left[x]
    out = [c for c in (*left, *right) if not (c in left and c in right)]
    return summed_pair(f, n, (a, b), ("".join(left), "".join(right), "".join(out))) if out else None


_RULES: dict[object, Callable[[Facts, fx.Node], Contraction | None]] = {
    aten.matmul.default: _matmul,
    aten.mm.default: _matmul,
    aten.bmm.default: _matmul,
    aten.mv.default: _matmul,
    aten.baddbmm.default: _baddbmm,
    aten.addmm.default: _baddbmm,
    aten.einsum.default: _einsum,
    aten.sum.dim_IntList: _summed,
    aten.mean.dim: _summed,
    aten.inner.default: _inner,
    aten.cosine_similarity.default: _cosine,
    aten.tensordot.default: _tensordot,
    aten.linalg_vecdot.default: _vecdot,
}


@asked_once
def mixture(f: Facts, n: fx.Node) -> Contraction | None:
    """The sum that `n` makes of one axis of a tensor, weighted by a small matrix: heads that are mixed. The tensor is
    the left factor."""
    rule = _LAYERS.get(n.target) if n.op == "call_function" else None
    if rule is not None:
        return rule(f, n)
    product = contraction(f, n)
    if product is None or product.bias is not None:
        return None
    small = [side for side in (product.rhs, product.lhs) if f.rank(side) <= 2]
    if len(small) != 1 or not few(product.extent):
        return None
    return product if small[0] is product.rhs else swapped(product)


def swapped(product: Contraction) -> Contraction:
    """The same with the factors in the other order."""
    maps = product.maps

    def exchanged(at: Point, c: Expr) -> tuple[Point, Point]:
        lhs, rhs = maps(at, c)
        return rhs, lhs

    return replace(product, lhs=product.rhs, rhs=product.lhs, maps=exchanged)


_MOST_HEADS = 256


def few(x: Expr) -> bool:
    """Whether an extent may be one of heads."""
    return isinstance(x, Const) and int(x.value) <= _MOST_HEADS


def _linear(f: Facts, n: fx.Node) -> Contraction | None:
    x: Any = n.args[0]
    weight: Any = n.args[1]
    if f.rank(x) < 2 or not few(f.shape(x)[-1]):
        return None

    def maps(at: Point, c: Expr) -> tuple[Point, Point]:
        return (*at[:-1], c), (at[-1], c)

    return Contraction(n, x, weight, f.shape(x)[-1], maps, argument(n, "bias"))


def _pointwise_convolution(f: Facts, n: fx.Node) -> Contraction | None:
    """A convolution with a kernel of one tap is a linear layer over channels."""
    x: Any = n.args[0]
    weight: Any = n.args[1]
    taps = f.rank(weight) - 2
    spatial: Any = [argument(n, name) for name in ("stride", "padding", "dilation")]
    plain = all(set(given) <= {kept} for given, kept in zip(spatial, (1, 0, 1), strict=True))
    if argument(n, "groups") != 1 or not plain or f.rank(x) != taps + 2 or not few(f.shape(x)[1]):
        return None
    if any(s is not ONE for s in f.shape(weight)[2:]):
        return None

    def maps(at: Point, c: Expr) -> tuple[Point, Point]:
        return (at[0], c, *at[2:]), (at[1], c, *([ZERO] * taps))

    return Contraction(n, x, weight, f.shape(x)[1], maps, argument(n, "bias"), bias_dim=1)


_LAYERS: dict[object, Callable[[Facts, fx.Node], Contraction | None]] = {
    aten.linear.default: _linear,
    aten.conv1d.default: _pointwise_convolution,
    aten.conv2d.default: _pointwise_convolution,
}
