"""What is said of the sign of an expression holds of its numbers."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attncc.ir.attention import S
from attncc.ir.build import op, where
from attncc.ir.evaluate import Evaluator
from attncc.ir.expr import Const, Expr, walk
from attncc.ir.signs import is_flat, sign

SCORES = torch.linspace(-3.0, 3.0, 241, dtype=torch.float64)
UNARY = ("exp", "sigmoid", "abs", "neg", "log1p", "sqrt", "rsqrt", "relu2", "square", "stop")
BINARY = ("add", "sub", "mul", "div", "max", "maxfirst", "min", "minfirst", "where")


def grown(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    return st.one_of(
        st.builds(unary, st.sampled_from(UNARY), inner), st.builds(binary, st.sampled_from(BINARY), inner, inner)
    )


def unary(name: str, x: Expr) -> Expr:
    if name == "square":
        return op("mul", x, x)
    return op("pow", op("maxfirst", Const(0.0), x), Const(2.0)) if name == "relu2" else op(name, x)


def binary(name: str, x: Expr, y: Expr) -> Expr:
    return where(op("lt", S, Const(0.5)), x, y) if name == "where" else op(name, x, y)


LEAVES = st.sampled_from([S, Const(0.0), Const(1.0), Const(0.5), Const(-1.0), Const(2.0)])
EXPRESSIONS = st.recursive(LEAVES, grown, max_leaves=6)


def numbers(x: Expr, at: torch.Tensor = SCORES) -> torch.Tensor:
    return Evaluator({S: at}, {}, torch.float64)(x).expand(at.shape)


def moderate(x: Expr) -> torch.Tensor:
    """Where nothing in an expression is out of a float's comfort."""
    return torch.stack([numbers(y).abs() < 300 for y in walk(x) if y.kind == "float"]).all(0)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(EXPRESSIONS)
def test_signs_hold(x: Expr) -> None:
    said = sign(x)
    found = numbers(x)[moderate(x)]  # beyond, a float rounds what is above zero to zero
    if said == 2:
        assert bool((found > 0).all()), x
    if said == 1:
        assert bool((found >= 0).all()), x


def test_what_is_known() -> None:
    """The property above holds of one who knows nothing, too."""
    parabola = op("add", op("add", Const(1.0), S), op("mul", op("mul", S, S), Const(0.5)))
    for x, known in [
        (op("exp", S), 2), (op("abs", S), 1), (op("add", op("abs", S), Const(1.0)), 2), (parabola, 2), (S, 0),
        (op("maxfirst", Const(0.0), S), 1), (op("mul", S, S), 1), (op("sub", op("mul", S, S), Const(1.0)), 0),
    ]:  # fmt: skip
        assert sign(x) == known, x


@settings(max_examples=100, deadline=None, derandomize=True)
@given(EXPRESSIONS)
def test_where_an_expression_is_zero_and_said_to_be_flat_it_has_no_gradient(x: Expr) -> None:
    if sign(x) == 0 or not is_flat(x):
        return
    at = SCORES.clone().requires_grad_()
    found = numbers(x, at)
    if not found.requires_grad:
        return
    (slope,) = torch.autograd.grad(found.sum(), at)
    zero = (found == 0) & slope.isfinite()
    assert float(slope[zero].abs().max() if bool(zero.any()) else 0.0) == 0.0, x
    assert math.isfinite(float(zero.sum()))
