"""Products of two tensors summed over a shared axis, in all their spellings: access maps of both factors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from attncc.ir.build import add, cast, const, mul, op
from attncc.ir.expr import Expr, Load
from attncc.patterns.elements import operand
from attncc.patterns.facts import Facts, argument
from attncc.patterns.moves import Point, broadcast, fitted

if TYPE_CHECKING:
    from attncc.patterns.value import Reader

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
    alpha: float = 1.0
    beta: float = 1.0

    def value(self, r: Reader, at: Point) -> Expr:
        """The expression at a point, with the bare product as a load named `dot:<node>`."""
        x: Expr = Load(DOT + self.node.name, at, "float")
        rounding = ROUNDED.get(r.facts.dtype(self.node))
        if self.alpha != 1.0:
            x = mul(x, const(float(self.alpha)))
        if self.bias is not None and self.beta != 0:
            bias = operand(r, self.node, self.bias, at)
            assert bias is not None
            x = add(x, mul(cast(bias, "float"), const(float(self.beta))))
        return x if rounding is None else op(rounding, x)


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
    if not isinstance(alpha, int | float) or not isinstance(beta, int | float):
        return None

    def maps(at: Point, c: Expr) -> tuple[Point, Point]:
        return (*at[:-1], c), (*at[:-2], c, at[-1])

    return Contraction(n, a, b, f.shape(a)[-1], maps, bias, alpha, beta)


def _einsum(f: Facts, n: fx.Node) -> Contraction | None:
    equation: Any = n.args[0]
    factors: Any = n.args[1]
    if len(factors) != 2 or "." in equation:
        return None
    equation = equation.replace(" ", "")
    left, _, out = equation.partition("->")
    first, second = left.split(",")
    if "->" not in equation:
        out = "".join(sorted(c for c in set(first + second) if (first + second).count(c) == 1))
    if len(set(first)) != len(first) or len(set(second)) != len(second):
        return None
    summed = [c for c in dict.fromkeys(first + second) if c not in out]
    if len(summed) != 1 or summed[0] not in first or summed[0] not in second:
        return None
    a: Any = factors[0]
    b: Any = factors[1]

    def maps(at: Point, c: Expr) -> tuple[Point, Point]:
        where = dict(zip(out, at, strict=True)) | {summed[0]: c}
        return (
            broadcast(f, a, tuple(where[x] for x in first)),
            broadcast(f, b, tuple(where[x] for x in second)),
        )

    return Contraction(n, a, b, f.shape(a)[first.index(summed[0])], maps)


_RULES: dict[object, Callable[[Facts, fx.Node], Contraction | None]] = {
    aten.matmul.default: _matmul,
    aten.mm.default: _matmul,
    aten.bmm.default: _matmul,
    aten.mv.default: _matmul,
    aten.baddbmm.default: _baddbmm,
    aten.addmm.default: _baddbmm,
    aten.einsum.default: _einsum,
}
