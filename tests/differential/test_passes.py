"""Each pass keeps what an attention computes: interpret(before) == interpret(after)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_ir.programs import Program, programs

from attncc.ir import Attention, Const, Index, Op, Size, interpret, parse_attention, parse_expr, verify
from attncc.ir.terms import ROUNDINGS, walk
from attncc.passes.rewrites.drop_rounding import drop_rounding
from attncc.passes.rewrites.fold_predicates import fold_predicates
from attncc.passes.rewrites.split_axes import split_axes

RANDOM = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def same(before: Attention, after: Attention, tensors: Mapping[str, torch.Tensor], sizes: Sequence[int]) -> None:
    """Equal outputs in float64, up to axes of `before` that lie as several in `after`."""
    wanted = interpret(before, tensors, sizes, compute=torch.float64)
    found = interpret(verify(after), tensors, sizes, compute=torch.float64)
    for name, x in wanted.items():
        torch.testing.assert_close(found[name].reshape(x.shape), x, rtol=1e-12, atol=1e-12, equal_nan=True)


@RANDOM
@given(programs())
def test_fold_predicates(program: Program) -> None:
    after = fold_predicates(program.attention)
    same(program.attention, after, program.tensors, program.sizes)
    assert fold_predicates(after) == after


@RANDOM
@given(programs())
def test_split_axes(program: Program) -> None:
    same(program.attention, split_axes(program.attention), program.tensors, program.sizes)


@RANDOM
@given(programs(), st.sampled_from(ROUNDINGS))
def test_drop_rounding(program: Program, name: str) -> None:
    """A rounding of every float disappears: what is left equals the attention without rounding, even when honoured."""
    a = program.attention
    rounded = replace(a, score=Op(name, (Op("mul", (Op(name, (a.score,)), Const(0.5))),)), weight=Op(name, (a.weight,)))
    dropped = drop_rounding(rounded)
    wide = torch.float64
    wanted = interpret(rounded, program.tensors, program.sizes, compute=wide, rounding=False)
    found = interpret(dropped, program.tensors, program.sizes, compute=wide, rounding=True)
    if not any(isinstance(x, Op) and x.name in ROUNDINGS for x in walk(dropped.score, dropped.weight)):
        for key, x in wanted.items():
            torch.testing.assert_close(found[key], x, equal_nan=True, rtol=1e-12, atol=1e-12)
    else:
        assert any(isinstance(x, Op) and x.name in ("lt", "le", "int", "eq", "ne") for x in walk(a.score, a.weight))


def grouped(q: str, k: str, batch: str, shapes: tuple[str, str], sizes: str = "", layout: str = "") -> Attention:
    return verify(
        parse_attention(f"""attention
{sizes}
batch  {batch}
axis   i = 5, j = 7, d = 4, e = 4
tensor q: f32[{shapes[0]}]
tensor k: f32[{shapes[1]}]
tensor v: f32[{shapes[1]}]
tensor slope: f32[8]
q      q[{q}]
k      k[{k}, j, d]
v      v[{k}, j, e]
score  s * slope[h % 8]
mask   j <= i + h
norm   softmax
empty  zero
weight w
give   out, lse, weights
dtype  f32
{layout}
""")
    )


def tensors_of(a: Attention, sizes: Sequence[int] = ()) -> dict[str, torch.Tensor]:
    table = dict(zip(a.sizes, sizes, strict=True))
    g = torch.Generator().manual_seed(0)

    def number(x: object) -> int:
        match x:
            case Size():
                return table[x]
            case Const(value):
                return int(value)
            case Op("mul", (l, r)):
                return number(l) * number(r)
            case _:
                raise TypeError(x)

    return {t.name: torch.randn([number(n) for n in t.shape], generator=g) for t in a.tensors}


def test_grouped_heads_split_into_group_and_member() -> None:
    a = grouped("b, h, i, d", "b, h // 4", "b = 2, h = 8", ("2, 8, 5, 4", "2, 2, 7, 4"), layout="layout b, i, h, e")
    after = split_axes(a)
    assert [(x.name, x.extent) for x in after.batch] == [("b", Const(2)), ("h0", Const(2)), ("h1", Const(4))]
    names = {n: Index(n) for n in ("b", "h0", "h1", "i", "j", "d", "e")}
    assert after.k.index[1] is Index("h0")
    assert after.q.index[1] is parse_expr("h0 * 4 + h1", names, {})
    assert after.layout == ("b", "i", "h0", "h1", "e")
    same(a, after, tensors_of(a), ())


def test_several_divisors_of_one_axis() -> None:
    a = grouped("h // 8, h % 8 // 4, h % 4, i, d", "h // 8, h % 8 // 4", "h = 24", ("3, 2, 4, 5, 4", "3, 2, 7, 4"))
    after = split_axes(a)
    assert [x.extent for x in after.batch] == [Const(3), Const(2), Const(4)]
    assert all(isinstance(n, Index) for n in (*after.q.index, *after.k.index))
    same(a, after, tensors_of(a), ())


def test_a_flattened_batch_of_unknown_size_splits_where_its_factors_are_known() -> None:
    a = grouped("h, i, d", "h // 8, h % 8", "h = BH", ("BH, 5, 4", "B, 8, 7, 4"), sizes="size   BH, B")
    assert split_axes(a) == a
    b = Size("B")
    after = split_axes(a, {Size("BH"): Op("mul", (b, Const(8)))})
    assert [x.extent for x in after.batch] == [b, Const(8)]
    same(a, after, tensors_of(a, (24, 3)), (24, 3))


def test_an_indivisible_axis_stays() -> None:
    a = grouped("h, i, d", "h // 3", "h = 8", ("8, 5, 4", "3, 7, 4"))
    assert split_axes(a) == a


FOLDED = {
    "0 <= i - j": "j <= i",
    "j < i + 1": "j <= i",
    "i - j < 4 and j <= i and i - j < 9": "i <= j + 3 and j <= i",
    "j < 7": "True",
    "j < 0": "False",
    "j <= i and i + 1 <= j": "False",
    "j <= i or i < j": "True",
    "j <= i and (j <= i or j < 3)": "j <= i",
    "where(h < 2, j <= i, i <= j)": "h <= 1 and j <= i or 2 <= h and i <= j",
    "j <= i + 7": "True",
    "i < 5 and j <= i": "j <= i",
    "j == i + 9": "False",
    "j <= i or j <= i + 2": "j <= i + 2",
    "not (j <= i and j < 3)": "i + 1 <= j or 3 <= j",
    "j % 4 < 4": "True",
    "j // 2 * 2 <= j": "True",
}


@pytest.mark.parametrize("mask", FOLDED)
def test_folded_text(mask: str) -> None:
    a = grouped("b, h, i, d", "b, h", "b = 2, h = 8", ("2, 8, 5, 4", "2, 8, 7, 4"))
    names = {x.name: x.index for x in a.axes}
    folded = fold_predicates(replace(a, mask=parse_expr(mask, names, {}))).mask
    assert repr(folded) == repr(parse_expr(FOLDED[mask], names, {}))


def test_roundings_that_decide_stay() -> None:
    a = grouped("b, h, i, d", "b, h", "b = 2, h = 8", ("2, 8, 5, 4", "2, 8, 7, 4"))
    names = {"s": a.score.children[0], **{x.name: x.index for x in a.axes}}
    score = parse_expr("where(bf16(s) < 0.5, bf16(bf16(s) * 2.0), f16(s))", names, {})
    assert repr(drop_rounding(replace(a, score=score)).score) == "where(bf16(s) < 0.5, s * 2.0, s)"
