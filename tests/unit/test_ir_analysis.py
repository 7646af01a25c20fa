"""Each fact of an expression against its values: what is said of it holds at every point that is tried."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping

import pytest
import torch

from attncc.codegen import cpp, triton
from attncc.ir import Attention, Expr, Index, Load, Op, S, Size, Var, W, parse_attention, parse_expr
from attncc.ir.analysis import (
    at_sizes,
    blocks_of,
    comparison_sides,
    keeps_nan,
    linear_factor,
    members,
    scaled,
    uses,
    zero_at_zero,
)
from attncc.ir.build import add, and_, const, floordiv, le, lt, mod, mul, not_, op, or_, sub, where
from attncc.ir.evaluate import Evaluator
from attncc.ir.expr import free, loads, mentions, walk

I, J, H, N = Index("i"), Index("j"), Index("h"), Size("N")  # noqa: E741
ROWS, KEYS, HEADS = 3, 11, 2
SEED = 5

Choose = random.Random


def values(x: Expr, leaves: Mapping[Expr, torch.Tensor] | None = None) -> torch.Tensor:
    """`x` at every row and key, for scores, weights and data that are different everywhere."""
    random_numbers = torch.Generator().manual_seed(SEED)

    def numbers() -> torch.Tensor:
        found = torch.randn(HEADS, ROWS, KEYS, generator=random_numbers, dtype=torch.float64)
        return found + found.sign() * 0.1

    at: dict[Expr, torch.Tensor] = {
        H: torch.arange(HEADS)[:, None, None], I: torch.arange(ROWS)[:, None], J: torch.arange(KEYS),
        N: torch.tensor(KEYS), S: numbers(), W: numbers(),
    }  # fmt: skip
    tensors = {"gate": numbers()[0, 0], "bias": numbers()[0], "doc": torch.arange(KEYS) // 3 * 2 % 5}
    found = Evaluator({**at, **(leaves or {})}, tensors, torch.float64)(x)
    return found.expand(HEADS, ROWS, KEYS)


_FLOATS: tuple[Expr, ...] = (
    S, Load("gate", (J,), "float"), Load("bias", (I, J), "float"), *map(const, (0.0, 1.0, -1.0, 0.5, 3.0)),
)  # fmt: skip
_UNARY = ("neg", "abs", "tanh", "erf", "sin", "cos", "exp", "sigmoid", "floor", "ceil", "round", "bf16", "f32")
_BINARY = ("add", "sub", "mul", "div", "min", "max")


def number(choose: Choose, leaf: Var, depth: int = 4) -> Expr:
    """A float expression, as often as not of `leaf`."""
    if depth == 0 or choose.random() < 0.15:
        return leaf if choose.random() < 0.5 else choose.choice(_FLOATS)
    kind = choose.randrange(8)
    if kind < 2:
        return op(choose.choice(_UNARY), number(choose, leaf, depth - 1))
    if kind < 7:
        return op(choose.choice(_BINARY), number(choose, leaf, depth - 1), number(choose, leaf, depth - 1))
    condition = choose.choice([lt(J, const(5)), le(J, I), lt(number(choose, leaf, 1), const(0.5))])
    return where(condition, number(choose, leaf, depth - 1), number(choose, leaf, depth - 1))


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-9, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("leaf", [S, W])
def test_a_linear_factor_is_one(leaf: Var) -> None:
    choose, told = random.Random(0), 0
    for _ in range(3000):
        x = number(choose, leaf, choose.randrange(1, 5))
        factor = linear_factor(x, leaf)
        if factor is None:
            continue
        told += mentions(x, leaf) and x is not leaf
        assert not mentions(factor, leaf), x
        by = values(factor)
        for at in (values(leaf), torch.full((), -3.0, dtype=torch.float64), torch.zeros((), dtype=torch.float64)):
            got, want = values(x, {leaf: at}), at * by
            finite = by.isfinite() & got.isfinite()
            assert close(got[finite], want.expand_as(got)[finite]), (x, factor)
            assert bool((by.isfinite() == got.isfinite()).all()) or not bool(by.isfinite().all()), (x, factor)
    assert told > 100


def test_zero_at_zero_is_zero_there() -> None:
    choose, told, refuted = random.Random(1), 0, 0
    zero = {W: torch.zeros((), dtype=torch.float64)}
    for _ in range(3000):
        x = number(choose, W)
        found = values(x, zero)
        if zero_at_zero(x, W):
            told += x is not W
            assert bool((found[found.isfinite()] == 0).all()), x  # 0 * inf is NaN: the other factors are to be finite
        else:
            refuted += bool(found.any())
    assert told > 300 and refuted > 300


def test_what_keeps_nan_is_nan() -> None:
    choose, told, refuted = random.Random(2), 0, 0
    nan = {W: torch.full((), math.nan, dtype=torch.float64)}
    for _ in range(3000):
        x = number(choose, W)
        found = values(x, nan).isnan().all()
        told += keeps_nan(x, W)
        refuted += not found
        assert bool(found) or not keeps_nan(x, W), x
    assert told > 300 and refuted > 300


def test_a_scale_is_taken_out_whole() -> None:
    choose, told = random.Random(3), 0
    for _ in range(2000):
        x = number(choose, S)
        y, by = scaled(x)
        told += y is not x
        assert by > 0 and scaled(y)[1] == 1.0
        assert close(values(x), values(y) * by), x
    assert told > 50
    assert scaled(mul(mul(S, const(0.5)), const(0.25))) == (S, 0.125)
    assert scaled(mul(S, const(-0.5)))[1] == 1.0  # a negative scale turns the largest into the smallest


@pytest.mark.parametrize(
    ("text", "factor"),
    [
        ("w", "1.0"), ("w * gate[j]", "gate[j]"), ("gate[j] * w", "gate[j]"), ("bf16(w) / 2.0", "0.5"),
        ("where(j < 3, w, 0.0)", "where(j < 3, 1.0, 0.0)"), ("w - w * s", "1.0 - s"), ("-w", "-1.0"),
    ],
)  # fmt: skip
def test_linear_factors(text: str, factor: str) -> None:
    assert linear_factor(of(text), W) is of(factor)


@pytest.mark.parametrize(
    "text", ["w * w", "w + 1.0", "exp(w)", "gate[j]", "tanh(w)", "where(w < 0.5, w, 0.0)", "1.0 / w"]
)
def test_what_is_not_linear(text: str) -> None:
    assert linear_factor(of(text), W) is None


def of(text: str) -> Expr:
    return parse_expr(text, {"w": W, "s": S, "j": J, "i": I}, {"gate": "float"})


@pytest.mark.parametrize("weight", ["tanh(w)", "erf(w)", "max(w, 0.0) * 2.0", "min(w, 0.5)", "w * w"])
@pytest.mark.parametrize("empty", ["mean", "nan"])
def test_emitters_take_the_same_weights(weight: str, empty: str) -> None:
    a = attention(mask="j < i - 3", weight=weight, empty=empty)
    assert cpp.unsupported(a) is None and triton.unsupported(a) is None


@pytest.mark.parametrize("weight", ["w + 1.0", "cos(w)", "gate[j]", "where(j < 3, w, 0.1)"])
def test_emitters_refuse_the_same_weights(weight: str) -> None:
    a = attention(mask="j < i - 3", weight=weight, empty="mean")
    assert cpp.unsupported(a) is not None and triton.unsupported(a) is not None


def test_uses_are_the_places_that_read() -> None:
    choose = random.Random(8)
    for _ in range(300):
        roots = [number(choose, S), number(choose, W)]
        roots += roots[:1] * choose.randrange(2)
        parents = list(walk(*roots))
        for x, count in uses(*roots).items():
            assert count == roots.count(x) + sum(list(y.children).count(x) for y in parents)


# ---- predicates ------------------------------------------------------------------------------------------------------


def integer(choose: Choose, depth: int = 2) -> Expr:
    if depth == 0 or choose.random() < 0.3:
        leaves = (I, J, J, H, N, Load("doc", (J,), "int"), Load("doc", (I,), "int"), *map(const, (0, 1, 2, 5)))
        return choose.choice(leaves)
    if choose.random() < 0.4:
        return choose.choice([floordiv, mod])(integer(choose, depth - 1), const(choose.choice([2, 3, 4])))
    return choose.choice([add, sub, mul])(integer(choose, depth - 1), integer(choose, depth - 1))


def predicate(choose: Choose) -> Expr:
    return op(choose.choice(["lt", "le", "eq", "ne"]), integer(choose), integer(choose))


def test_members_join_to_what_they_were_taken_from() -> None:
    choose = random.Random(4)
    joins: dict[str, Callable[..., Expr]] = {"and": and_, "or": or_}
    for _ in range(200):
        name, join = choose.choice(list(joins.items()))
        parts = [choose.choice([predicate(choose), not_(predicate(choose)), or_(predicate(choose), predicate(choose))])
                 for _ in range(choose.randrange(1, 5))]  # fmt: skip
        x = join(*parts)
        assert torch.equal(values(x), values(join(*members(name, x)))), x
        assert not any(isinstance(m, Op) and m.name == name for m in members(name, x))


@pytest.mark.parametrize("rows", [(I,), (I, H)])
def test_the_sides_of_a_comparison_make_it(rows: tuple[Expr, ...]) -> None:
    choose, told = random.Random(5), 0
    for _ in range(1000):
        x = predicate(choose)
        sides = comparison_sides(x, J, rows)
        if sides is None:
            continue
        told += J in free(x) and not free(x).isdisjoint(rows)
        assert not mentions(sides.row, J) and not mentions(sides.key, *rows), x
        assert torch.equal(values(x), values(op(sides.relation, sides.row, sides.key))), x
    assert told > 100


def test_what_is_the_same_throughout_a_block() -> None:
    choose, told = random.Random(6), 0
    for _ in range(2000):
        x = choose.choice([predicate, integer])(choose)
        if choose.random() < 0.7:
            by = const(choose.choice([2, 3]))
            x = rewritten(x, {J: floordiv(J, by)})
        found = blocks_of(x, J)
        if found is None:
            continue
        told += 1
        numbered, size = found
        assert torch.equal(values(x), values(numbered, {J: torch.arange(KEYS) // size})), x
    assert told > 300
    assert blocks_of(floordiv(add(J, I), const(2)), J) is blocks_of(I, J) is None
    assert blocks_of(add(floordiv(J, const(2)), floordiv(J, const(3))), J) is None


def rewritten(x: Expr, table: dict[Expr, Expr]) -> Expr:
    """`x` with leaves replaced, those of what replaces them left alone."""
    if x in table:
        return table[x]
    if isinstance(x, Load):
        return Load(x.tensor, tuple(rewritten(n, table) for n in x.index), x.kind)
    return op(x.name, *(rewritten(n, table) for n in x.args)) if isinstance(x, Op) else x


def attention(*, mask: str, weight: str, empty: str) -> Attention:
    return parse_attention(
        "attention\nsize   N\nbatch  h = 4\naxis   i = N, j = N, d = 16, e = 16\ntensor q: f32[4, N, 16]\n"
        "tensor k: f32[4, N, 16]\ntensor v: f32[4, N, 16]\ntensor gate: f32[N]\nq      q[h, i, d]\n"
        f"k      k[h, j, d]\nv      v[h, j, e]\nscore  s\nmask   {mask}\nnorm   softmax\nempty  {empty}\n"
        f"weight {weight}\ngive   out\ndtype  f32\n"
    )


# ---- sizes -----------------------------------------------------------------------------------------------------------


def test_sizes_make_an_integer_of_an_expression_over_them() -> None:
    choose, told = random.Random(7), 0
    sizes = {Size("N"): KEYS, Size("M"): 4}
    at: dict[Expr, torch.Tensor] = {size: torch.tensor(n) for size, n in sizes.items()}
    for _ in range(300):
        x = rewritten(integer(choose), {I: Size("M"), J: N, H: const(3)})
        if loads(x):
            with pytest.raises(ValueError, match="more than N, M"):
                at_sizes(x, sizes)
            continue
        told += 1
        assert at_sizes(x, sizes) == int(Evaluator(at, {}, torch.float64)(x))
    assert told > 100
