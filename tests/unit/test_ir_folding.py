"""What the builders fold means what was written."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from random_ir.expressions import Pair, pairs

from attncc.ir import Const, Expr, Index, Load, Op, S
from attncc.ir.affine import simplify
from attncc.ir.build import FALSE, TRUE, add, and_, cast, const, eq, lt, mul, not_, op, or_, sub, where
from attncc.ir.evaluate import Evaluator
from attncc.ir.expr import Size

I, J, N = Index("i"), Index("j"), Size("N")  # noqa: E741
ROWS, KEYS = 3, 4
TENSORS = {
    "doc": torch.tensor([2, 0, -1]),
    "bias": torch.tensor([[0.0, 1.5, -2.0, math.inf], [-math.inf, math.nan, 1e9, -1e9], [0.25, -1.0, 3.0, 2.5]]),
    "seen": torch.tensor([True, False, True, True]),
}


def evaluate(x: Expr, compute: torch.dtype = torch.float64) -> torch.Tensor:
    rows, keys = torch.arange(ROWS)[:, None], torch.arange(KEYS)[None]
    scores = torch.tensor([[1.0, -2.0, 0.0, 5.0], [math.nan, math.inf, -1.0, 0.5], [2.0, 2.0, -3.5, 1e9]])
    leaves = {I: rows, J: keys, N: torch.tensor(KEYS), S: scores.to(compute)}
    return Evaluator(leaves, TENSORS, compute)(x).expand(ROWS, KEYS)


@settings(max_examples=1000, deadline=None, derandomize=True, database=None)
@given(pairs())
def test_folded_equals_written(pair: Pair) -> None:
    assert pair.folded.kind == pair.written.kind
    written, folded = evaluate(pair.written), evaluate(pair.folded)
    assert written.dtype == folded.dtype
    if pair.written.kind == "float":  # the last digit of torch's square root is the processor's
        torch.testing.assert_close(folded, written, rtol=1e-14, atol=1e-14, equal_nan=True)
    else:
        assert torch.equal(written, folded)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(pairs("int"))
def test_simplified_indices_equal_written(pair: Pair) -> None:
    extents = {I: const(ROWS), J: N}
    assert torch.equal(evaluate(pair.written), evaluate(simplify(pair.folded, extents)))


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(pairs())
def test_folding_is_idempotent(pair: Pair) -> None:
    x = pair.folded
    if isinstance(x, Op):
        assert op(x.name, *x.args) is x


_UNARY = ["exp", "log", "tanh", "sqrt", "floor", "ceil", "abs", "neg"]


@pytest.mark.parametrize("name", _UNARY)
@pytest.mark.parametrize("value", [0.0, -0.0, 0.5, -0.5, -1.0, 2.5, 1e3, -1e3, 1e308, math.inf, -math.inf, math.nan])
def test_folded_functions_agree_with_torch(name: str, value: float) -> None:
    folded = op(name, const(value))
    assert isinstance(folded, Const)
    want = evaluate(Op(name, (const(value),)))[0, 0]
    got = torch.tensor(folded.value, dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=1e-15, atol=0, equal_nan=True)
    assert math.copysign(1, folded.value) == math.copysign(1, want) or math.isnan(want)


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div", "min", "max", "lt", "le", "eq", "ne"])
def test_folded_binaries_agree_with_torch(name: str) -> None:
    values = [0.0, -0.0, 1.0, -3.0, 1e308, math.inf, -math.inf, math.nan]
    for a in values:
        for b in values:
            folded = op(name, const(a), const(b))
            assert isinstance(folded, Const)
            want = evaluate(Op(name, (const(a), const(b))))[0, 0].item()
            assert folded.value == want or (math.isnan(folded.value) and math.isnan(want)), (name, a, b)


@pytest.mark.parametrize("name", ["floordiv", "mod", "truncdiv"])
def test_folded_divisions_round_as_they_say(name: str) -> None:
    for a in range(-7, 8):
        for b in (-3, -2, -1, 1, 2, 3):
            assert op(name, const(a), const(b)).value == evaluate(Op(name, (const(a), const(b))))[0, 0].item()
    assert isinstance(op(name, const(1), const(0)), Op)
    big = 2**60 + 1
    assert op("truncdiv", const(-big), const(1)).value == -big


def test_what_cannot_be_folded_stays() -> None:
    for x in (math.nan, math.inf):
        assert isinstance(op("int", const(x)), Op)


def test_identities() -> None:
    assert add(I, const(0)) is I
    assert add(const(0.0), S) is S
    assert mul(I, const(0)) is const(0)
    assert isinstance(mul(S, const(0.0)), Op)  # NaN and infinity
    assert sub(I, I) is const(0)
    assert isinstance(sub(S, S), Op)
    assert op("floordiv", I, const(1)) is I
    assert op("mod", I, const(1)) is const(0)
    assert op("neg", op("neg", S)) is S
    assert op("max", S, S) is S


def test_boolean_identities() -> None:
    p = lt(I, J)
    assert and_(p, TRUE, p) is p
    assert and_(p, FALSE) is FALSE
    assert or_(p, TRUE) is TRUE
    assert or_() is FALSE and and_() is TRUE
    assert not_(not_(p)) is p
    assert not_(p) is op("le", J, I)
    assert isinstance(not_(lt(S, const(0.0))), Op) and not_(lt(S, const(0.0))).name == "not"
    assert not_(and_(p, eq(I, const(2)))) is or_(op("le", J, I), op("ne", I, const(2)))


def test_where_identities() -> None:
    p, q = Load("seen", (J,), "bool"), lt(I, J)
    assert where(TRUE, I, J) is I
    assert where(p, S, S) is S
    assert where(p, TRUE, FALSE) is p
    assert where(p, FALSE, q) is and_(not_(p), q)
    assert where(not_(p), S, const(0.0)) is where(p, const(0.0), S)


def test_where_under_a_condition_that_is_known() -> None:
    p, q = Load("seen", (J,), "bool"), eq(I, J)
    x, y, z = S, const(0.0), const(-100.0)
    assert where(p, where(p, x, y), z) is where(p, x, z)
    assert where(p, z, where(p, x, y)) is where(p, z, y)
    assert where(q, z, where(not_(q), x, y)) is where(q, z, x)
    assert where(q, where(not_(q), x, y), z) is where(q, y, z)


def test_casts_there_and_back() -> None:
    p = lt(I, J)
    assert cast(cast(p, "float"), "bool") is p
    assert cast(cast(p, "int"), "bool") is p
    assert eq(cast(p, "int"), const(0)) is not_(p)
    assert cast(cast(I, "float"), "int") is I
