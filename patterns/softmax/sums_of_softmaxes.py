"""Weights that several softmaxes make together, taken apart: the product is linear, so each is an attention of its own.

    (p - m * r) @ v                  =  (p) @ v  +  (-m * r) @ v
    (sum_g mix[h, g] * p[g]) @ v[h]  =  sum_g (mix[h, g] * p[g]) @ v[h]
    stack([p, r]).mean(0) @ v        =  (p / 2) @ v  +  (r / 2) @ v
    (p * m).sum(2) @ v               =  sum_g (p[g] * m[g]) @ v

What multiplies a softmax stays with it, as the weight of its attention; what the result is summed over outside is an
index of the batch like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from attncc.ir.attention import W
from attncc.ir.build import ZERO, add, eq, mul, op, where
from attncc.ir.expr import ROUNDINGS, Const, Expr, Index, Load, Op, free, loads, rewrite, substitute
from attncc.ir.reasons import because
from attncc.patterns.site import (
    DOT,
    Frame,
    Reader,
    Unreadable,
    compares,
    contraction,
    few,
    input_at,
    mixture,
    swapped,
)
from attncc.patterns.softmax.anchors import Anchor, Term
from attncc.patterns.softmax.mixed_heads import pooled

#: More terms than this are a computation of its own.
_MOST_TERMS = 8


@dataclass(frozen=True)
class _Addend:
    value: Expr
    mixed: Mapping[Expr, Expr]

    def map(self, f: Callable[[Expr], Expr]) -> _Addend:
        return replace(self, value=f(self.value))


def terms(frame: Frame, anchors: Mapping[str, Anchor]) -> list[Term]:
    """The weights of a product as a sum of functions of one softmax each; none if no softmax is read along the keys.

    `anchors` are those of the graph by the name of their node. Raises Unreadable where the weights are no such sum."""
    leaves = frozenset(a.node for a in anchors.values())
    split = _Split(frame, frame.reader(pair=frozenset({frame.c}), leaves=leaves), anchors)
    whole = split.reader.value_at(frame.weights, frame.weights_at, frame.read)
    addends = [_Addend(whole, {})]
    if split.is_sum(whole):
        addends = _gathered(split, split.addends(whole))
    found = [split.term(x) for x in addends if split.points(x.value)]
    bare = [x for x in addends if not split.points(x.value)]
    if not found or not bare:
        return found
    return [_with(found[0], bare), *found[1:]]


def _with(term: Term, bare: list[_Addend]) -> Term:
    """A term with what no softmax has a part in: added where the indices that it is summed over are zero."""
    rest = bare[0].value
    for x in bare[1:]:
        rest = add(rest, x.value)
    if any(x.mixed for x in bare):
        raise Unreadable(term.anchor.node, because("mixture-part"))
    for index in term.mixed:
        rest = where(eq(index, ZERO), rest, Const(0.0))
    return replace(term, weight=add(term.weight, rest))


def _gathered(split: _Split, addends: list[_Addend]) -> list[_Addend]:
    """Addends that read the same softmax at the same point, as one."""
    found: dict[tuple[object, ...], _Addend] = {}
    for n, x in enumerate(addends):
        key: tuple[object, ...] = (n,) if x.mixed else tuple(sorted(split.points(x.value), key=repr))
        before = found.get(key)
        found[key] = x if before is None else replace(x, value=add(before.value, x.value))
    return list(found.values())


@dataclass(frozen=True)
class _Sum:
    """sum_g factor * value, `extent` of them."""

    extent: Expr
    factor: Expr
    value: Expr


@dataclass
class _Split:
    frame: Frame
    reader: Reader
    anchors: Mapping[str, Anchor]
    indices: int = 0

    def points(self, x: Expr) -> set[Load]:
        """Where softmaxes are read along the keys, or along what is mixed into them."""
        return {y for y in loads(x) if y.tensor in self.anchors and self.frame.c in free(*y.index)}

    def is_sum(self, x: Expr) -> bool:
        """Whether there is more than one softmax to take apart."""
        return len(self.points(x)) > 1 or any(map(self.mixed, loads(x)))

    def term(self, x: _Addend) -> Term:
        points = self.points(x.value)
        if len(points) > 1:
            raise Unreadable(self.frame.product.node, because("no-sum-of-softmaxes"))
        (point,) = points
        weight = rewrite(x.value, lambda y: W if y is point else None)
        return Term(self.anchors[point.tensor], point.index, weight, x.mixed)

    def addends(self, x: Expr) -> list[_Addend]:
        """`x` as a sum, taken apart as far as a softmax is in it."""
        if not (self.points(x) or self.is_sum(x)):
            return [_Addend(x, {})]
        found = self._taken_apart(x)
        if len(found) > _MOST_TERMS:
            raise Unreadable(self.frame.product.node, because("too-many-softmaxes"))
        return found

    def _taken_apart(self, x: Expr) -> list[_Addend]:
        match x:
            case Load():
                return self._unmixed(x)
            case Op(name, (a,)) if name in ROUNDINGS or name in ("neg", "stop"):
                return [y.map(lambda v: op(name, v)) for y in self.addends(a)]
            case Op("add", (a, b)):
                return [*self.addends(a), *self.addends(b)]
            case Op("sub", (a, b)):
                return [*self.addends(a), *(y.map(lambda v: op("neg", v)) for y in self.addends(b))]
            case Op("mul", (a, b)):
                left, right = self.addends(a), self.addends(b)
                if len(left) * len(right) > _MOST_TERMS:
                    return [_Addend(x, {})]
                return [_Addend(mul(y.value, z.value), {**y.mixed, **z.mixed}) for y in left for z in right]
            case Op("div", (a, b)) if not self.is_sum(b) and not self.points(b):
                return [y.map(lambda v: op("div", v, b)) for y in self.addends(a)]
            case Op("where", (c, a, b)) if not self.is_sum(c) and not self.points(c):
                zero = Const(0.0)
                yes = [y.map(lambda v: where(c, v, zero)) for y in self.addends(a) if y.value is not zero]
                no = [y.map(lambda v: where(c, zero, v)) for y in self.addends(b) if y.value is not zero]
                return [*yes, *no]
            case _:
                return [_Addend(x, {})]

    def mixed(self, x: Load) -> bool:
        """Whether a load sums softmaxes over a few elements: heads that are mixed, or several that were stacked."""
        return bool(self._summed(x, Index("g")))

    def _summed(self, x: Load, g: Expr) -> list[_Sum]:
        """What a load sums over a few elements, at one of them: nothing if no softmax is in it."""
        r, f = self.reader, self.reader.facts
        n = f.by_name[x.tensor.removeprefix(DOT)]
        if x.tensor in self.anchors:
            return []
        product = mixture(f, n) or contraction(f, n)
        if product is not None and few(product.extent):
            sides = (product, swapped(product)) if mixture(f, n) is None else (product,)
            found = [
                _Sum(product.extent, r.value_at(p.rhs, right, f.order[n]), r.value_at(p.lhs, left, f.order[n]))
                for p in sides for left, right in (p.maps(x.index, g),)
            ]  # fmt: skip
            held = [y for y in found if self.points(y.value) or self.is_sum(y.value)]
            known = mixture(f, n) is not None or any(self._is_stacked(y) or self._is_batched(y, g) for y in held)
            return held if known else []
        summed = pooled(f, n)
        if summed is None:
            return []
        source, dim, kept = summed
        extent = f.shape(source)[dim]
        assert isinstance(extent, Const)  # it is pooled over few
        factor = 1.0 / extent.value if n.target is torch.ops.aten.mean.dim else 1.0
        value = r.value_at(source, (*x.index[:dim], g, *x.index[dim + kept :]), f.order[n])
        return [_Sum(extent, Const(factor), value)] if self.points(value) or self.is_sum(value) else []

    def _is_stacked(self, x: _Sum) -> bool:
        """Whether the elements are of several softmaxes, each picked by its number."""
        return isinstance(x.extent, Const) and x.extent.value <= _MOST_TERMS and len(self.points(x.value)) > 1

    def _is_batched(self, x: _Sum, g: Expr) -> bool:
        """Whether the elements are softmaxes beside each other, each of scores of its own over the same keys."""
        points = self.points(x.value)
        found = [(self.anchors[p.tensor], p.index) for p in points]
        apart = all(g in free(*at) and g not in free(at[a.dim]) for a, at in found)
        return bool(points) and apart and all(compares(self.reader.facts, a.scores) for a, _ in found)

    def _unmixed(self, x: Load) -> list[_Addend]:
        """The addends of a load that sums softmaxes: one over an index, or each where several were stacked."""
        g = Index(f"g{self.indices}")
        found = next(iter(self._summed(x, g)), None)
        if found is None:
            return [_Addend(x, {})]
        r = self.reader
        n = r.facts.by_name[x.tensor.removeprefix(DOT)]
        if self._is_stacked(found) and isinstance(found.extent, Const):
            each: list[_Addend] = []
            tables: list[dict[Expr, Expr]] = [{g: Const(k)} for k in range(int(found.extent.value))]
            for at in tables:
                factor = substitute(found.factor, at)
                each += [y.map(partial(mul, factor)) for y in self.addends(substitute(found.value, at))]
            return each
        self.indices += 1
        r.extents[g] = found.extent
        whole = [_Addend(mul(found.factor, y.value), {**y.mixed, g: found.extent}) for y in self.addends(found.value)]
        product = mixture(r.facts, n)
        if product is not None and product.bias is not None and x.tensor == n.name:  # a product's is outside its load
            bias = input_at(r, n, product.bias, product.added(x.index))
            if bias is None:
                raise Unreadable(n, because("bias-unread"))
            whole.append(_Addend(bias, {}))
        return whole
