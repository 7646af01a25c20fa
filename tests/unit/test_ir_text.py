"""The text of expressions and attentions is canonical and comes back as it was."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from random_ir.expressions import LENGTH, Pair, pairs

from attncc.ir import (
    Const,
    Expr,
    Index,
    Load,
    ParseError,
    S,
    W,
    parse_attention,
    parse_expr,
    print_attention,
    print_expr,
)
from attncc.ir.build import add, and_, const, eq, le, lt, mul, not_, op, or_, sub, where

I, J = Index("i"), Index("j")  # noqa: E741
NAMES: dict[str, Expr] = {"i": I, "j": J, "N": LENGTH, "s": S, "w": W}
KINDS = {"doc": "int", "bias": "float", "seen": "bool", "scalar": "float"}


def parse(text: str) -> Expr:
    return parse_expr(text, NAMES, KINDS)


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(pairs())
def test_expressions_round_trip(pair: Pair) -> None:
    text = print_expr(pair.folded)
    assert parse(text) is pair.folded
    assert repr(pair.folded) == text


SEEN = Load("seen", (J,), "bool")


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (sub(I, sub(J, LENGTH)), "i - (j - N)"),
        (sub(sub(I, J), LENGTH), "i - j - N"),
        (mul(add(I, J), LENGTH), "(i + j) * N"),
        (add(mul(I, J), LENGTH), "i * j + N"),
        (op("floordiv", op("mod", I, J), const(2)), "i % j // 2"),
        (op("floordiv", I, op("mod", J, const(2))), "i // (j % 2)"),
        (op("neg", add(I, J)), "-(i + j)"),
        (op("neg", I), "-i"),
        (sub(I, op("neg", J)), "i - -j"),
        (mul(op("neg", S), S), "-s * s"),
        (op("neg", mul(S, S)), "-(s * s)"),
        (const(-3), "-3"),
        (add(I, const(-3)), "i + -3"),
        (Const(-0.0), "-0.0"),
        (const(math.inf), "inf"),
        (const(-math.inf), "-inf"),
        (const(math.nan), "nan"),
        (const(1e-7), "1e-07"),
        (const(True), "True"),
        (const(1), "1"),
        (const(1.0), "1.0"),
        (and_(or_(SEEN, lt(I, J)), le(J, I)), "(seen[j] or i < j) and j <= i"),
        (or_(and_(SEEN, lt(I, J)), le(J, I)), "seen[j] and i < j or j <= i"),
        (not_(SEEN), "not seen[j]"),
        (and_(not_(SEEN), lt(I, J)), "not seen[j] and i < j"),
        (not_(lt(S, const(0.0))), "not s < 0.0"),
        (eq(add(I, J), mul(I, J)), "i + j == i * j"),
        (where(SEEN, S, const(0.0)), "where(seen[j], s, 0.0)"),
        (Load("bias", (I, add(J, const(1))), "float"), "bias[i, j + 1]"),
        (Load("scalar", (), "float"), "scalar[()]"),
        (op("bf16", op("exp", S)), "bf16(exp(s))"),
    ],
)
def test_canonical_text(x: Expr, text: str) -> None:
    assert print_expr(x) == text
    assert parse(text) is x


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("i +", "not an expression"),
        ("i; j", "not an expression"),
        ("\0", "not an expression"),
        ("", "not an expression"),
        ("x + i", "undeclared name 'x'"),
        ("unknown[i]", "load from an undeclared tensor"),
        ("i.real", "unexpected Attribute"),
        ("i[j]", "load from an undeclared tensor"),
        ("cbrt(s)", "unknown function"),
        ("exp(x=s)", "unknown function"),
        ("i < j < N", "chained comparison"),
        ("i ** j", "operator Pow"),
        ("i > j", "operator Gt"),
        ("i in j", "operator In"),
        ("~i", "unary operator"),
        ("+i", "unary operator"),
        ("'text'", "constant 'text'"),
        ("None", "constant None"),
        ("1j", "constant 1j"),
        ("i + s", "one kind"),
        ("i and j", "cannot take a int"),
        ("exp(s, s)", "takes 1 arguments, got 2"),
        ("lambda: i", "unexpected Lambda"),
        ("i if seen[j] else j", "unexpected IfExp"),
    ],
)
def test_parse_errors_of_expressions(text: str, message: str) -> None:
    with pytest.raises(ParseError, match=message):
        parse(text)


TEXT = """\
attention
size   B, N
batch  b = B, h = 8
axis   i = N, j = N, d = 64, e = 64
tensor q: bf16[B, 8, N, 64]
tensor k: bf16[B, 2, N, 64]
tensor v: bf16[B, 2, N, 64]
tensor bias: f32[8, N]
q      q[b, h, i, d]
k      k[b, h // 4, j, d]
v      v[b, h // 4, j, e]
score  s * 0.125 + bias[h, j]
mask   j <= i
norm   softmax
empty  zero
weight w
give   out, lse
dtype  bf16
layout b, i, h, e
"""


def test_an_attention_in_text() -> None:
    a = parse_attention(TEXT)
    assert print_attention(a) == TEXT
    assert a.sink is None
    assert [x.name for x in a.axes] == ["b", "h", "i", "j", "d", "e"]
    assert a.outputs == ("out", "lse")
    assert a.mask is le(J, I)


def test_blank_lines_do_not_matter() -> None:
    assert parse_attention("\n" + TEXT.replace("\n", "\n\n")) == parse_attention(TEXT)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("attention\n", "", "starts with the line 'attention'"),
        ("score  s * 0.125 + bias[h, j]\n", "", "no line 'score'"),
        ("norm   softmax", "norm   sparsemax", "norm is one of softmax, sigmoid, relu, none, not 'sparsemax'"),
        ("empty  zero", "empty  zero, nan", "the line 'empty' has one word"),
        ("empty  zero", "empty  inf", "empty is one of"),
        ("give   out, lse", "give   out, entropy", "give is one of"),
        ("dtype  bf16", "dtype  f8", "dtype is one of"),
        ("axis   i = N, j = N, d = 64, e = 64", "axis   i = N, j = N", "names i, j, d and e"),
        ("h = 8", "h = 8 * 2.0", "one kind"),
        ("h = 8", "h = N * 2", "an axis is `name = extent`"),
        ("h = 8", "h", "not an expression"),
        ("h = 8", "h h = 8", "an axis is `name = extent`"),
        ("bf16[B, 8, N, 64]", "bf17[B, 8, N, 64]", "a tensor is `name: dtype"),
        ("tensor bias: f32[8, N]", "tensor bias f32[8, N]", "a tensor is `name: dtype"),
        ("tensor bias: f32[8, N]", "tensor bias: f32[8, M]", "undeclared name 'M'"),
        ("q      q[b, h, i, d]", "q      x[b, h, i, d]", "q is `tensor"),
        ("q      q[b, h, i, d]", "q      q", "q is `tensor"),
        ("mask   j <= i", "mask   j <= i\nmask   j < i", "the line 'mask' appears twice"),
        ("batch  b = B, h = 8", "batch  b = B\nbatch  h = 8", "the line 'batch' appears twice"),
        ("mask   j <= i", "mask   j <= i\nwindow 3", "unknown line 'window'"),
        ("mask   j <= i", "mask   j <= i\nlet    t0 =", "not an expression"),
    ],
)
def test_parse_errors_of_attentions(old: str, new: str, message: str) -> None:
    assert old in TEXT
    with pytest.raises(ParseError, match=message):
        parse_attention(TEXT.replace(old, new, 1))


def test_shared_subexpressions_get_a_name_of_their_kind() -> None:
    shared = "let    t0 = i - j < 3 and j <= i and bias[h, j] < 1.0"
    text = TEXT.replace("score  s * 0.125", f"{shared}\nscore  where(t0, s, -s)").replace("mask   j <= i", "mask   t0")
    a = parse_attention(text)
    assert print_attention(a) == text
    assert a.mask.kind == "bool"
    assert a.score.args[0].args[0] is a.mask


def test_names_of_shared_subexpressions_avoid_the_declared_ones() -> None:
    text = TEXT.replace("size   B, N", "size   B, N, t0").replace("score  s * 0.125", "score  s * exp(float(t0) * 0.5)")
    text = text.replace("exp(float(t0) * 0.5)", "(exp(float(t0) * 0.5 + 1.0) + exp(exp(float(t0) * 0.5 + 1.0)))")
    a = parse_attention(text)
    printed = print_attention(a)
    assert "let    t1 = " in printed and "let    t0 = " not in printed
    assert parse_attention(printed) == a


def test_names_of_shared_subexpressions_avoid_tensors() -> None:
    text = TEXT.replace("bias", "t0").replace("score  s * 0.125", "score  s * exp(t0[h, j] * 0.5 + 1.0)")
    text = text.replace("weight w", "weight w * exp(t0[h, j] * 0.5 + 1.0)")
    a = parse_attention(text)
    assert "let    t1 = exp(t0[h, j] * 0.5 + 1.0)\n" in print_attention(a)
    assert parse_attention(print_attention(a)) == a
