"""Scores that are mixed over heads before their softmax are one product, over heads and components together:

    sum_g mix[h, g] * (sum_d q[g, i, d] * k[g, j, d])  =  sum_(g, d) (mix[h, g] * q[g, i, d]) * k[g, j, d]

`mix` is what all that is done to the scores of one head comes to: a matrix or several one after another, the scores
themselves added (the identity), their mean over heads, numbers and small tensors that scale them, other ones for each
sample or query where the model has it so. The queries of all heads, scaled, are a tensor of their own; the keys are
read as they lie, or copied. A bias that is added before is mixed by itself: it has the size of scores, but usually no
batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

import torch
from torch import fx

from attncc.ir.attention import S
from attncc.ir.build import ONE, ZERO, add, floordiv, mod, mul, op
from attncc.ir.expr import ROUNDINGS, Const, Expr, Index, Load, Op, free, loads, substitute
from attncc.patterns.site import (
    DOT,
    SUMS_AND_MEANS,
    Contraction,
    Facts,
    Frame,
    Point,
    Product,
    Reader,
    argument,
    broadcast,
    contraction,
    einsum,
    few,
    input_at,
    mixture,
    one_dim,
    products_in,
    stops,
    summed,
    swapped,
)

aten = torch.ops.aten


_HEAD = Index("g")


class _NotLinear(Exception):
    """Something is done to scores that no mixture of them does."""


@dataclass(frozen=True)
class _Addend:
    """`scale` times small tensors times `value`, a product of queries and keys or a bias, summed over `over`. The model
    stops the gradients of a product that is `stopped`."""

    value: Expr
    score: bool
    stopped: bool = False
    factors: tuple[Load, ...] = ()
    scale: float = 1.0
    over: Mapping[Expr, Expr] = field(default_factory=dict[Expr, Expr])

    def times(self, x: Expr) -> _Addend:
        if not self.score and not self.over and not self.factors:
            return replace(self, value=mul(self.value, x))
        found = self
        for y in _factors(x):
            if isinstance(y, Const):
                found = replace(found, scale=found.scale * y.value)
            elif _is_plain(y):
                found = replace(found, factors=(y, *found.factors))
            else:
                raise _NotLinear
        return found


@dataclass(frozen=True)
class _Mixed:
    """What one addend says of the scores: `scale` times small tensors, of the scores of a head."""

    stopped: bool
    head: Index
    factors: tuple[Load, ...]
    scale: float
    over: frozenset[Expr]


@dataclass(frozen=True)
class Mixture:
    """The part `whole` of a score that is a sum of scores of several heads, `inner` the product of one of them."""

    frame: Frame
    whole: Expr
    scores: tuple[_Mixed, ...]
    biases: tuple[_Addend, ...]
    inner: Product
    heads: Expr

    def product(self) -> Product | None:
        """The product over heads and components together; None where some factor has no plain place in it."""
        f, use, inner = self.frame.facts, self.frame.use, self.inner
        if len({x.stopped for x in self.scores}) > 1:
            return None  # one product has one gradient
        if self.scores[0].stopped:
            q, k = (f.make(aten.detach.default, (n,), use) for n in (inner.q, inner.k))
            inner = replace(inner, q=q, k=k)
        d, depth = inner.contracted
        scales = {x.scale for x in self.scores}
        scale = (scales.pop() if len(scales) == 1 else 1.0) or 1.0
        factors = _matrix(f, [replace(x, scale=x.scale / scale) for x in self.scores], inner.q, self.heads, use)
        if factors is None or f.writes(inner.q, f.order[inner.node] - 1, use):
            return None
        factors.append((inner.q, inner.q_at))
        indices = list(dict.fromkeys(i for _, at in reversed(factors) for i in at if isinstance(i, Index)))
        alike = {f.dtype(n) for n, _ in factors} == {f.value(inner.q).dtype}
        biases = [_bias(f, x, use) for x in self.biases]
        if not alike or _HEAD not in indices:
            return None
        shared = _HEAD not in free(*inner.k_at)  # by all heads: what they are asked can be summed before
        joined = Index("gd")
        together = [d] if shared else [i for i in (_HEAD, d) if i in indices]
        gone = frozenset[Expr]((_HEAD, d)).union(*(x.over for x in self.scores))
        q = summed(f, factors, [i for i in indices if i not in gone], together, joined, use)
        if q is None:
            return None
        digits: dict[Expr, Expr] = {d: joined}
        if not shared:
            digits = {_HEAD: floordiv(joined, depth), d: mod(joined, depth)}
        k_at = tuple(substitute(i, digits) for i in inner.k_at)
        contracted = joined, depth if shared else mul(self.heads, depth)
        value: Expr = mul(S, Const(scale))
        for x in biases:
            if x is None:
                return None
            value = add(value, x)
        return Product(inner.load, inner.node, q.node, q.at, inner.k, k_at, inner.row, contracted, value)


def mixture_in(frame: Frame, score: Expr) -> Mixture | None:
    """The largest part of a score that sums scores of several heads, None if there is none."""
    taker = _Taker(frame)
    for x in taker.parts(score):
        addends = taker.taken(x)
        for of in addends:
            own = [i for i in of.over if isinstance(of.value, Load) and i in of.value.index]
            if not of.score or len(own) != 1:
                continue
            one = substitute(of.value, {own[0]: _HEAD})
            inner = next(products_in(frame.facts, one, frame.c, frame.rows), None)
            if inner is None or (inner.row is not None and inner.row not in free(*inner.q_at)):
                continue
            scores = [_mixed(y, inner.load) for y in addends if _reads(y, inner.load)]
            others = [y for y in addends if not _reads(y, inner.load)]
            found = [y for y in scores if y is not None]
            if len(found) == len(scores) and not any(y.score and (y.over or y.factors) for y in others):
                return Mixture(frame, x, tuple(found), tuple(others), inner, of.over[own[0]])
    return None


def _reads(x: _Addend, of: Load) -> bool:
    return x.score and isinstance(x.value, Load) and x.value.tensor == of.tensor


def _mixed(x: _Addend, of: Load) -> _Mixed | None:
    """What an addend mixes into the scores, `of` being their product at one head; None where it reads them elsewhere
    than at a head."""
    assert isinstance(x.value, Load)
    head = next(a for a, b in zip(x.value.index, of.index, strict=True) if a is not b)
    alike = all(a is b or b is _HEAD for a, b in zip(x.value.index, of.index, strict=True))
    return _Mixed(x.stopped, head, x.factors, x.scale, frozenset(x.over)) if alike and isinstance(head, Index) else None


def _matrix(
    f: Facts, terms: list[_Mixed], q: fx.Node, heads: Expr, use: int
) -> list[tuple[fx.Node, Point]] | None:  # fmt: skip
    """The tensors whose product is what scores of one head are mixed with, of the type of `q`. None where they are not
    of plain indices."""
    found: list[tuple[list[tuple[fx.Node, Point]], float]] = []
    for x in terms:
        renamed: dict[Expr, Expr] = {x.head: _HEAD} if x.head in x.over else {}
        factors: list[tuple[fx.Node, Point]] = [
            (f.by_name[y.tensor], tuple(substitute(i, renamed) for i in y.index)) for y in x.factors
        ]
        if not renamed or not factors:
            if not isinstance(heads, Const):
                return None
            ones = f.make(aten.new_ones.default, (q, [int(heads.value)]), use)
            factors.append((ones, (_HEAD,)))
            if not renamed:  # the scores of the head itself
                factors[-1] = (f.make(aten.diag_embed.default, (ones,), use), (x.head, _HEAD))
        known = free(*(i for _, at in factors for i in at))
        if any(y not in known for y in x.over - {x.head}):
            return None
        found.append((factors, x.scale))
    if len(found) == 1:
        return found[0][0]
    summed_over = frozenset[Expr]().union(*(x.over for x in terms))
    indices = dict.fromkeys(
        i for factors, _ in found for _, at in factors for i in at
        if isinstance(i, Index) and (i is _HEAD or i not in summed_over)
    )  # fmt: skip
    total: fx.Node | None = None
    for factors, scale in found:
        own = [i for i in indices if any(i in at for _, at in factors)]
        n = einsum(f, factors, own, use)
        if n is None:
            return None
        for dim, i in enumerate(indices):
            n = n if i in own else f.make(aten.unsqueeze.default, (n, dim), use)
        n = n if scale == 1.0 else f.make(aten.mul.Scalar, (n, scale), use)
        total = n if total is None else f.make(aten.add.Tensor, (total, n), use)
    assert total is not None
    return [(total, tuple(indices))]


def _bias(f: Facts, x: _Addend, use: int) -> Expr | None:
    """What an addend adds that has no part in the scores: an expression, or a tensor that is made of its factors."""
    if not x.over and not x.factors:
        return x.value if x.scale == 1.0 else mul(x.value, Const(x.scale))
    held = [*x.factors, x.value]
    operands: list[tuple[fx.Node, Point]] = [(f.by_name[y.tensor], y.index) for y in held if isinstance(y, Load)]
    for i, extent in x.over.items():  # factors summed before would make one -inf of terms that are inf and -inf
        if isinstance(x.value, Load) and i not in free(*x.value.index) and isinstance(extent, Const):
            n, at = operands[-1]
            n = f.make(aten.unsqueeze.default, (n, 0), use)
            n = f.make(aten.expand.default, (n, [int(extent.value), *[-1] * len(at)]), use)
            operands[-1] = n, (i, *at)
    known = free(*(i for _, at in operands for i in at))
    if any(not isinstance(y, Load | Const) for y in held) or not known.issuperset(x.over):
        return None
    out = list(dict.fromkeys(i for _, at in reversed(operands) for i in at if isinstance(i, Index) and i not in x.over))
    n = einsum(f, operands, out, use)
    scale = x.scale * (x.value.value if isinstance(x.value, Const) else 1.0)
    return None if n is None else mul(Load(n.name, tuple(out), "float"), Const(scale))


class _Taker:
    """Takes parts of a score apart into addends."""

    def __init__(self, frame: Frame) -> None:
        self.frame, self.facts, self.c = frame, frame.facts, frame.c
        self.heads = 0

    def parts(self, x: Expr) -> Iterator[Expr]:
        """The largest subexpressions that are sums of scores."""
        try:
            if self.holds(x):
                self.taken(x)
                yield x
        except _NotLinear:
            for child in x.children:
                yield from self.parts(child)

    def holds(self, x: Expr) -> bool:
        """Whether scores may be in an expression."""
        return any(self.c in free(*y.index) and self._may_score(y) for y in loads(x))

    def _may_score(self, x: Load) -> bool:
        n = self.facts.by_name[x.tensor.removeprefix(DOT)]
        return x.tensor.startswith(DOT) or mixture(self.facts, n) is not None or pooled(self.facts, n) is not None

    def taken(self, x: Expr) -> list[_Addend]:
        """The addends of an expression. Raises _NotLinear."""
        if not self.holds(x):
            return [_Addend(x, score=False)]
        match x:
            case Load():
                return self._mixed(x) or [_Addend(x, score=x.tensor.startswith(DOT))]
            case Op(name, (a,)) if name in ROUNDINGS:
                return self.taken(a)
            case Op("stop", (Load() as a,)):
                found = self.taken(a)
                if not all(y.score for y in found):
                    raise _NotLinear
                return [replace(y, stopped=True) for y in found]
            case Op("neg", (a,)):
                return [y.times(Const(-1.0)) for y in self.taken(a)]
            case Op("add", (a, b)):
                return [*self.taken(a), *self.taken(b)]
            case Op("sub", (a, b)):
                return [*self.taken(a), *(self._negative(y) for y in self.taken(b))]
            case Op("mul", (a, b)) if not (self.holds(a) and self.holds(b)):
                held, other = (a, b) if self.holds(a) else (b, a)
                return self._scaled(held, other)
            case Op("div", (a, Const(b))) if b != 0:
                return self._scaled(a, Const(1.0 / b))
            case _:
                raise _NotLinear

    def _negative(self, x: _Addend) -> _Addend:
        return x.times(Const(-1.0)) if x.score or x.factors else replace(x, value=op("neg", x.value))

    def _scaled(self, x: Expr, by: Expr) -> list[_Addend]:
        if self.c in free(by):
            raise _NotLinear
        return [y.times(by) for y in self.taken(x)]

    def _mixed(self, x: Load) -> list[_Addend]:
        """The addends of scores that were mixed, none where no scores are in what a load reads."""
        f = self.facts
        n = f.by_name[x.tensor.removeprefix(DOT)]
        g: Expr = Index(f"g{self.heads}")
        mix, few_of = self._mixture(n, x, g), pooled(f, n)
        if mix is not None:
            g = ZERO if mix.extent is ONE else g
            (at, right), inner, extent = mix.maps(x.index, g), mix.lhs, mix.extent
        elif few_of is not None:
            (inner, dim, kept), right = few_of, ()
            at, extent = (*x.index[:dim], g, *x.index[dim + kept :]), f.shape(inner)[dim]
        else:
            return []
        self.heads += 1
        self.frame = self.frame.over({g: extent})
        reader = self.frame.reader()
        scores, at, biases = self._without_biases(reader, inner, at, f.order[n])
        try:
            found = self.taken(reader.value_at(scores, at, f.order[n]))
        except _NotLinear:
            if x.tensor.startswith(DOT):
                return []
            raise
        if not any(y.score for y in found):
            return []
        if any(f.writes(node, f.order[node], self.frame.use) for node, _ in biases):
            raise _NotLinear
        found += [_Addend(Load(node.name, point, "float"), score=False) for node, point in biases]
        found = [replace(y, over={**y.over, g: extent}) for y in found] if extent is not ONE else found
        if mix is None:
            count = int(extent.value) if n.target is aten.mean.dim and isinstance(extent, Const) else 1
            return [y.times(Const(1.0 / count)) for y in found]
        by = reader.value_at(mix.rhs, right, f.order[n])
        if not all(isinstance(y, Const) or _is_plain(y) for y in _factors(by)):
            by = Load(mix.rhs.name, right, "float")
        if self.c in free(by) or f.writes(mix.rhs, f.order[n] - 1, self.frame.use):
            raise _NotLinear
        found = [y.times(by) for y in found]
        if mix.bias is not None and not x.tensor.startswith(DOT):  # a product's is outside its load
            bias = input_at(reader, n, mix.bias, mix.added(x.index))
            found += [] if bias is None else [_Addend(bias, score=False)]
        return found

    def _without_biases(
        self, r: Reader, n: fx.Node, at: Point, when: int
    ) -> tuple[fx.Node, Point, list[tuple[fx.Node, Point]]]:  # fmt: skip
        """Scores at a point less the tensors that are added to their product, and these, as they are at `when`."""
        f = self.facts
        found: list[tuple[fx.Node, Point]] = []
        while n.target is aten.add.Tensor and argument(n, "alpha") == 1 and all(f.is_tensor(x) for x in n.args):
            sides: list[tuple[fx.Node, Point]] = [(x, broadcast(f, x, at)) for x in n.all_input_nodes]
            held = [self.holds(r.value_at(x, p, f.order[n])) for x, p in sides]
            if sorted(held) != [False, True] or f.writes(n, f.order[n], when) or any(stops(f, n, x) for x, _ in sides):
                break
            found.append(sides[held.index(False)])
            n, at = sides[held.index(True)]
        return n, at, found

    def _mixture(self, n: fx.Node, x: Load, g: Expr) -> Contraction | None:
        """The sum over a few heads that a load is, the scores being the left factor."""
        f = self.facts
        mix = mixture(f, n)
        product = None if mix is not None or not self.frame.rows else contraction(f, n)
        if product is not None and product.bias is None and few(product.extent):
            mix = product if self.c in free(*product.maps(x.index, g)[0]) else swapped(product)
        if mix is None:
            return None
        scores, weights = (free(*at) for at in mix.maps(x.index, g))
        rows = self.frame.rows
        return mix if self.c in scores - weights and (scores & rows or not weights & rows) else None


def pooled(f: Facts, n: fx.Node) -> tuple[fx.Node, int, bool] | None:
    """(tensor, dimension, whether it is kept) of a sum or mean over few elements, of what is no product itself."""
    if n.target not in SUMS_AND_MEANS or contraction(f, n) is not None:
        return None
    source: Any = n.args[0]
    dim = one_dim(f, source, argument(n, "dim"))
    return None if dim is None or not few(f.shape(source)[dim]) else (source, dim, bool(argument(n, "keepdim")))


def _is_plain(x: Expr) -> TypeGuard[Load]:
    return isinstance(x, Load) and not x.tensor.startswith(DOT)


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
