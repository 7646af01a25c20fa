"""The index algebra: nothing it proves is false, nothing it rewrites changes a value, and what masks need it proves."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attncc.ir import Const, Expr, Index, Op, Size, parse_expr
from attncc.ir.affine import divide, expr, less_than, linear_in, lower, nonnegative, poly, simplify, upper
from attncc.ir.build import ZERO, add, floordiv, maximum, minimum, mod, mul, sub, where
from attncc.ir.terms import walk

ROW, KEY, N, C, P = Index("i"), Index("j"), Size("N"), Size("C"), Size("P")
NAMES = {"i": ROW, "j": KEY, "N": N, "C": C, "P": P}
EXTENTS: dict[Expr, Expr] = {ROW: N, KEY: Const(7)}


def e(text: str) -> Expr:
    return parse_expr(text, NAMES, {})


def value(x: Expr, at: dict[Expr, int]) -> int:
    """`x` at a point, in Python's integers."""
    done: dict[Expr, int] = dict(at)
    for n in walk(x):
        match n:
            case Const(v):
                done[n] = int(v)
            case Op(name, args):
                done[n] = int(_PYTHON[name](*(done[a] for a in args)))
            case _:
                assert n in done
    return done[x]


_PYTHON = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "neg": lambda a: -a,
    "floordiv": lambda a, b: a // b, "mod": lambda a, b: a % b, "min": min, "max": max, "le": lambda a, b: a <= b,
    "lt": lambda a, b: a < b, "where": lambda c, a, b: a if c else b,
}  # fmt: skip


def points() -> list[dict[Expr, int]]:
    found: list[dict[Expr, int]] = []
    for n, c, p in itertools.product((1, 2, 9), (1, 3), (0, 5)):
        found += [{N: n, C: c, P: p, ROW: i, KEY: j} for i in range(n) for j in range(7)]
    return found


POINTS = points()

LEAVES = st.sampled_from([ROW, KEY, N, C, P, ROW, KEY, *(Const(n) for n in (-7, -2, -1, 0, 1, 2, 3, 8))])
DIVISORS = st.sampled_from([Const(1), Const(2), Const(3), Const(8), N, C, sub(mul(N, Const(2)), Const(1)), add(N, C)])


def deeper(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    pair = st.tuples(inner, inner)
    return st.one_of(
        st.builds(lambda f, p: f(*p), st.sampled_from([add, sub, minimum, maximum]), pair),
        st.builds(lambda x, n: mul(x, Const(n)), inner, st.integers(-3, 3)),
        st.builds(mul, inner, st.sampled_from([N, C, P])),
        st.builds(lambda f, x, n: f(x, n), st.sampled_from([floordiv, mod]), inner, DIVISORS),
        st.builds(lambda p, q: where(Op("le", p), *q), pair, pair),
    )


EXPRESSIONS = st.recursive(LEAVES, deeper, max_leaves=7)
CHECKED = settings(max_examples=150, deadline=None, derandomize=True)


@CHECKED
@given(EXPRESSIONS)
def test_canonical_form_keeps_the_value(x: Expr) -> None:
    canonical, simple = expr(poly(x)), simplify(x, EXTENTS)
    assert all(value(canonical, p) == value(x, p) == value(simple, p) for p in POINTS)


@CHECKED
@given(EXPRESSIONS)
def test_proofs_hold(x: Expr) -> None:
    values = [value(x, p) for p in POINTS]
    if nonnegative(x, EXTENTS):
        assert min(values) >= 0
    if less_than(x, ZERO, EXTENTS):
        assert max(values) < 0
    for bound, sign in ((lower(poly(x), EXTENTS), 1), (upper(poly(x), EXTENTS), -1)):
        if bound is not None:
            assert all(sign * value(expr(bound), p) <= sign * v for p, v in zip(POINTS, values, strict=True))


@CHECKED
@given(EXPRESSIONS, DIVISORS)
def test_division(x: Expr, by: Expr) -> None:
    quotient, rest = divide(x, by, EXTENTS)
    for p in POINTS:
        assert value(quotient, p) == value(x, p) // value(by, p)
        assert value(rest, p) == value(x, p) % value(by, p)


@CHECKED
@given(EXPRESSIONS)
def test_linear_parts(x: Expr) -> None:
    found = linear_in(x, ROW)
    if found is not None:
        a, b = (expr(p) for p in found)
        assert all(n is not ROW for n in walk(a, b))
        assert all(value(a, p) * p[ROW] + value(b, p) == value(x, p) for p in POINTS)


@pytest.mark.parametrize(
    "text",
    [
        "0", "i", "N - 1 - i", "6 - j", "i * N + j", "i % 4", "3 - i % 4", "i - i // 4 * 4", "i // 4 * 4 + 3 - i",
        "i // C * C + C - 1 - i", "i - i // C * C", "max(i - 3, 0)", "N - min(i, N - 1) - 1", "where(i < 3, i, 2)",
        "i // 2 - i // 2 // 2", "min(i, j)", "N * N - i", "(i + 5) // 2", "j // 2 + 1", "3 - j // 2", "C * j",
        "(j - 1) // 2 + 1", "2 - (j - 1) // 2",
    ],
)  # fmt: skip
def test_proves_never_negative(text: str) -> None:
    assert nonnegative(e(text), EXTENTS)


UNPROVEN = [
    "i - 1", "N - 2", "j - i", "-i", "i * -1 + 3", "N - C", "min(i, -1)", "i // 4 - 1", "P - 1", "N + P - 2", "C - 1",
]


@pytest.mark.parametrize("text", UNPROVEN)
def test_proves_nothing_false(text: str) -> None:
    assert not nonnegative(e(text), EXTENTS)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("(i * 4 + j) // 4", "i + j // 4"),
        ("(i * 7 + j) // 7", "i"),
        ("(i * 7 + j) % 7", "j"),
        ("(j * N + i) // N", "j"),
        ("(j * N + i) % N", "i"),
        ("i - i", "0"),
        ("min(i, N - 1)", "i"),
        ("max(j, 0) + min(i, N)", "i + j"),
        ("j // 7", "0"),
        ("i % N", "i"),
        ("(i + j) - (j - i)", "i * 2"),
        ("(i * 8 + 3) // 4", "i * 2"),
        ("(j * (N * 2 - 1) + i) // (N * 2 - 1)", "j"),
        ("(j * (N * 2 - 1) + i) % (N * 2 - 1)", "i"),
    ],
)
def test_simplified(before: str, after: str) -> None:
    assert simplify(e(before), EXTENTS) is e(after)


def test_an_index_is_below_an_extent_that_is_a_quotient() -> None:
    """Blocks of a length that is known at the call only are as long as `length // blocks`."""
    block = simplify(e("(N + 8 - N % 8) // (1 + (N - N % 8) // 8)"), {})
    extents: dict[Expr, Expr] = {ROW: block, KEY: Const(7)}
    assert less_than(ROW, block, extents) and less_than(add(mul(KEY, block), ROW), mul(block, Const(7)), extents)
    assert simplify(minimum(ROW, sub(block, Const(1))), extents) is ROW
    assert not less_than(ROW, sub(block, Const(1)), extents) and not less_than(ROW, e("N // 8"), extents)
