"""Programs and the nodes above attention: text that round-trips, verifiers that name what is wrong, and interpreters
that give what the equations say."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from torch.testing import assert_close

from attncc.ir import (
    Access,
    Axis,
    Boxes,
    Const,
    Correct,
    Index,
    Layout,
    Load,
    Merge,
    ParseError,
    Program,
    Rearrange,
    Reduce,
    S,
    Scores,
    Select,
    Size,
    Step,
    Table,
    Tensor,
    VerifyError,
    interpret_program,
    kind_of,
    parse_attention,
    parse_expr,
    parse_program,
    print_program,
    verify_program,
)  # fmt: skip
from attncc.ir.build import const, eq, floordiv, le, lt, mul
from attncc.ir.layout import interpret_layout, verify_layout
from attncc.ir.merge import interpret_merge, merge_of
from attncc.ir.node import KINDS, kind_called
from attncc.ir.rearrange import interpret_rearrange, verify_rearrange
from attncc.ir.reduce import interpret_reduce
from attncc.ir.scores import interpret_scores
from attncc.ir.select import interpret_select

ATTENTION = """attention
size   n
batch  b = 2
axis   i = n, j = n, d = 8, e = 8
tensor q: f32[2, n, 8]
tensor k: f32[2, n, 8]
tensor v: f32[2, n, 8]
q      q[b, i, d]
k      k[b, j, d]
v      v[b, j, e]
score  s * 0.25
mask   j <= i
norm   softmax
empty  zero
weight w
give   out, lse
dtype  f32
"""
CAUSAL = parse_attention(ATTENTION)
LATER = parse_attention(ATTENTION.replace("j <= i", "i + 1 <= j"))
N, M = Size("n"), Size("m")


def axes(**extents: int | Size) -> tuple[Axis, ...]:
    return tuple(Axis(name, n if isinstance(n, Size) else Const(n)) for name, n in extents.items())


def tensor(name: str, *shape: int | Size, dtype: str = "f32") -> Tensor:
    return Tensor(name, dtype, tuple(n if isinstance(n, Size) else Const(n) for n in shape))


def both_halves() -> Program:
    """A causal attention and its complement, merged into the attention over all keys, heads behind tokens."""
    merge = merge_of((N,), axes(b=2, i=N), axes(e=8), 2)
    bie, i_be = (("b",), ("i",), ("e",)), (("i",), ("b", "e"))
    order = Rearrange((N,), axes(b=2, i=N, e=8), (tensor("x", 2, N, 8),), bie, i_be)
    return Program(
        (M,), tuple(tensor(n, 2, M, 8) for n in "xyz"),
        (
            Step(("past", "past_lse"), CAUSAL, ("x", "y", "z"), (M,)),
            Step(("rest", "rest_lse"), LATER, ("x", "y", "z"), (M,)),
            Step(("whole",), merge, ("past_lse", "rest_lse", "past", "rest"), (M,)),
            Step(("shown",), order, ("whole",), (M,)),
        ),
        ("shown", "past_lse"),
    )  # fmt: skip


def test_a_program_means_what_its_steps_say() -> None:
    torch.manual_seed(0)
    p = verify_program(both_halves())
    q, k, v = torch.randn(3, 2, 11, 8, dtype=torch.float64)
    found = interpret_program(p, {"x": q, "y": k, "z": v}, [11], compute=torch.float64)
    s = q @ k.mT * 0.25
    assert_close(found["shown"], (s.softmax(-1) @ v).transpose(0, 1).reshape(11, 16))
    hidden = s.masked_fill(torch.ones(11, 11, dtype=torch.bool).triu(1), -math.inf)
    assert_close(found["past_lse"], hidden.logsumexp(-1))


def test_the_text_of_a_program_round_trips() -> None:
    p = both_halves()
    text = print_program(p)
    assert parse_program(text) == p and print_program(parse_program(text)) == text
    assert "step   past, past_lse = attention(q = x, k = y, v = z; n = m)\n  size   n\n" in text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("program", "programs", "starts with the line 'program'"),
        ("give   shown", "gives  shown", "line .*: unknown line 'gives'"),
        ("size   m", "size   m\n  x", "line 2: only a step has lines"),
        ("= merge(", "= melt(", "line .*: a step is"),
        ("(q = x, k = y", "(q = x, kk = y", "declares the tensors q, k, v"),
        ("; n = m)", "; o = m)", "declares the sizes n"),
        ("; n = m)", "; n = m + )", "line .*not an expression"),
        ("score  s * 0.25", "score  s * nothing", "line .*undeclared name 'nothing'"),
    ],
)
def test_bad_text_names_its_line(old: str, new: str, message: str) -> None:
    with pytest.raises(ParseError, match=message):
        parse_program(print_program(both_halves()).replace(old, new, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: replace(p, outputs=("nowhere",)), "nowhere is made by no step"),
        (lambda p: replace(p, outputs=()), "gives something"),
        (lambda p: replace(p, steps=p.steps[::-1]), r"step 0 \(rearrange\): x is whole, which no earlier step makes"),
        (lambda p: replace(p, steps=(*p.steps, p.steps[0])), "the value past is made twice"),
        (lambda p: replace(p, inputs=(*p.inputs, p.inputs[0])), "inputs: the value x is made twice"),
        (lambda p: replace(p, inputs=(replace(p.inputs[0], dtype="bf16"), *p.inputs[1:])), "q is f32, x is bf16"),
        (lambda p: replace(p, inputs=(tensor("x", 2, M, 9), *p.inputs[1:])), "q has the shape .*, x has"),
        (lambda p: replace(p, steps=(replace(p.steps[0], sizes=()), *p.steps[1:])), "0 sizes for 1"),
        (lambda p: replace(p, steps=(replace(p.steps[0], results=("past",)), *p.steps[1:])), "another number of"),
    ],
)  # fmt: skip
def test_the_verifier_names_the_step(change: object, message: str) -> None:
    with pytest.raises(VerifyError, match=message):
        verify_program(change(both_halves()))  # type: ignore[operator]


def test_every_kind_is_found_by_its_title_and_by_its_type() -> None:
    assert all(kind_called(kind.title) is kind for kind in KINDS)
    assert len({kind.type for kind in KINDS}) == len({kind.title for kind in KINDS}) == len(KINDS) >= 7
    with pytest.raises(TypeError, match="a str is not a node"):
        kind_of("attention")  # type: ignore[arg-type]


def examples() -> list[object]:
    x = tensor("x", 6, 4)
    q, k = tensor("q", 2, 20, 8), tensor("k", 2, 24, 8)
    b, i, j, d = (Index(n) for n in "bijd")
    value = parse_expr("x[a, b] * 0.5 + u[a]", {"a": Index("a"), "b": Index("b")}, {"x": "float", "u": "float"})
    return [
        CAUSAL,
        merge_of((), axes(r=6), axes(e=4), 3, outputs=("out", "lse", "share"), empty=(0.25, 0.75, math.inf)),
        merge_of((), axes(r=6), axes(e=4), 2, how="gated", dtype="bf16"),
        Correct((), axes(a=6, b=4), (x, tensor("u", 6)), value, "bf16"),
        Rearrange((N,), axes(a=6, b=N), (tensor("x", 6, N),), (("a",), ("b",)), ((), ("b",)), (1, 0)),
        Layout((), axes(t=6, e=4), (x,), "t", parse_expr("t * 5 % 6", {"t": Index("t")}, {}), inverse=True),
        Scores((N,), axes(b=2), *axes(i=20, j=24, d=8), (q, k), Load("q", (b, i, d), "float"),
               Load("k", (b, j, d), "float"), mul(S, const(0.5)), le(j, i), "none"),
        Select((), axes(b=2), axes(i=5, j=3), (tensor("p", 2, 5, 3),), Load("p", (b, i, j), "float"), "mass",
               const(0.9), le(j, i), eq(j, const(0))),
        Reduce((N,), axes(b=2), *axes(j=24), (k,), "mean", Load("k", (b, j, const(0)), "float"), lt(j, N), const(-1.0)),
        Boxes((N,), axes(b=2), *axes(i=20, p=6, j=24, d=8), (q, k), Load("q", (b, i, d), "float"),
              Access("k", (b, j, d)), 4, b, lt(j, N)),
        Table((), axes(b=2), (q,), (3, -1)),
    ]  # fmt: skip


@pytest.mark.parametrize("node", examples(), ids=lambda n: type(n).__name__)
def test_nodes_round_trip(node: object) -> None:
    kind = kind_of(node)  # type: ignore[arg-type]
    text = kind.print(kind.verify(node))
    assert kind.parse(text) == node
    assert kind.print(kind.parse(text)) == text
    with pytest.raises(ParseError):
        kind.parse(text + "surplus 1\n")


def test_a_merge_by_softmax_weighs_branches_by_what_their_keys_sum_to() -> None:
    torch.manual_seed(1)
    s, v = torch.randn(5, 9, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)
    s[2] = s[3, :4] = -math.inf  # a row that sees nothing, and one that sees nothing in the first branch
    parts = [s[:, :4], s[:, 4:]]
    given = {f"lse{k}": x.logsumexp(-1) for k, x in enumerate(parts)}
    given |= {f"out{k}": (x.softmax(-1).nan_to_num(0.0) @ v[at]) for k, (x, at) in
              enumerate(zip(parts, (slice(0, 4), slice(4, 9)), strict=True))}  # fmt: skip
    merge = merge_of((), axes(r=5), axes(e=3), 2, outputs=("out", "lse", "share"), empty=(0.0, 0.0))
    found = interpret_merge(merge, given, compute=torch.float64)
    assert_close(found["out"], s.softmax(-1).nan_to_num(0.0) @ v)
    assert_close(found["lse"], s.logsumexp(-1))
    assert_close((found["share0"] + found["share1"])[[0, 1, 3, 4]], torch.ones(4, dtype=torch.float64))
    plain = interpret_merge(merge_of((), axes(r=5), axes(e=3), 2), given, compute=torch.float64)
    assert plain["out"][2].isnan().all() and not plain["out"][3].isnan().any()


@pytest.mark.parametrize("how", ["sum", "gated"])
def test_other_merges(how: str) -> None:
    torch.manual_seed(2)
    outs, gates = torch.randn(3, 4, 2), torch.rand(3, 4)
    given = {f"out{k}": x for k, x in enumerate(outs)} | {f"gate{k}": g for k, g in enumerate(gates)}
    merge = merge_of((), axes(r=4), axes(e=2), 3, how=how)  # type: ignore[arg-type]
    want = outs.sum(0) if how == "sum" else (outs * gates[..., None]).sum(0)
    assert_close(interpret_merge(merge, given)["out"], want)


@pytest.mark.parametrize("order", list(permutations("abc")))
def test_a_rearrangement_is_a_permutation_of_axes(order: tuple[str, ...]) -> None:
    x = torch.arange(24.0).reshape(6, 4)
    node = Rearrange((), axes(a=2, b=3, c=4), (tensor("x", 6, 4),), (("a", "b"), ("c",)), tuple((n,) for n in order))
    found = interpret_rearrange(verify_rearrange(node), {"x": x})["out"]
    assert_close(found, x.reshape(2, 3, 4).permute(["abc".index(n) for n in order]))
    summed = replace(node, target=((order[0],), (order[2],), ()))
    want = x.reshape(2, 3, 4).sum("abc".index(order[1]))
    want = (want if order[0] < order[2] else want.T)[..., None]
    assert_close(interpret_rearrange(verify_rearrange(summed), {"x": x})["out"], want)
    laid = interpret_rearrange(verify_rearrange(replace(node, memory=(2, 0, 1))), {"x": x})["out"]
    assert_close(laid, found)
    assert laid.permute(2, 0, 1).is_contiguous()


def test_a_layout_and_its_inverse_are_nothing() -> None:
    torch.manual_seed(3)
    x = torch.randn(2, 12, 5)
    order = torch.stack([torch.randperm(12), torch.randperm(12)])
    source = Load("order", (Index("b"), Index("t")), "int")
    node = Layout((), axes(b=2, t=12, e=5), (tensor("x", 2, 12, 5), tensor("order", 2, 12, dtype="i64")), "t", source)
    moved = interpret_layout(verify_layout(node), {"x": x, "order": order})["out"]
    assert_close(moved[1, 3], x[1, order[1, 3]])
    back = interpret_layout(verify_layout(replace(node, inverse=True)), {"x": moved, "order": order})["out"]
    assert torch.equal(back, x)


def test_a_layout_is_a_bijection() -> None:
    source = parse_expr("t * 2 % 6", {"t": Index("t")}, {})
    with pytest.raises(VerifyError, match="no bijection"):
        verify_layout(Layout((), axes(t=6), (tensor("x", 6),), "t", source))


def selected(take: str, amount: float, values: torch.Tensor, over: int = 1, **more: object) -> torch.Tensor:
    named = tuple(Axis(f"x{n}", Const(size)) for n, size in enumerate(values.shape))
    value = Load("p", tuple(x.index for x in named), "float")
    p = tensor("p", *values.shape)
    split = len(named) - over
    node = Select((), named[:split], named[split:], (p,), value, take, const(amount), **more)  # type: ignore[arg-type]
    return interpret_select(kind_of(node).verify(node), {"p": values})["out"]


def test_ways_to_take() -> None:
    torch.manual_seed(4)
    p = torch.randn(7, 12).softmax(-1)
    values, order = p.sort(dim=-1, descending=True, stable=True)
    place = torch.arange(12).expand(p.shape)
    for take, amount, wanted in (
        ("count", 2.0, place < 2), ("fraction", 0.7, place < 9), ("mass", 0.7, values.cumsum(-1) - values < 0.7),
        ("least", 0.3, (values >= 0.3) | (place == 0)), ("mass", 1.0, place < 12), ("fraction", 0.25, place < 3),
    ):  # fmt: skip
        found = selected(take, amount, p)
        assert torch.equal(found, torch.zeros_like(found).scatter(-1, order, wanted)), take


def test_what_is_taken_is_open_and_begins_with_what_comes_first() -> None:
    torch.manual_seed(5)
    p = torch.rand(5, 6)
    a, b = Index("x0"), Index("x1")
    found = selected("count", 2.0, p, open=le(b, a), first=eq(b, const(0)))
    seen = torch.arange(6) <= torch.arange(5)[:, None]
    assert not bool((found & ~seen).any()) and bool(found[:, 0].all())
    assert torch.equal(found.sum(-1), seen.sum(-1).clamp(max=2))
    best = p.masked_fill(~seen, -1.0)[:, 1:].argmax(-1) + 1
    assert all(found[n, best[n]] for n in range(1, 5))
    crossed = selected("mass", 0.5, torch.tensor([[0.3, 0.1, 0.6]]), first=eq(b, const(1)))
    assert crossed.tolist() == [[False, True, True]], "the mass of what comes first counts"


def test_a_selection_over_two_axes_ranks_them_together_and_ties_go_to_the_lower_point() -> None:
    torch.manual_seed(6)
    p = torch.rand(2, 4, 5)
    found = selected("count", 3.0, p, over=2)
    want = torch.zeros(2, 20, dtype=torch.bool).scatter(-1, p.flatten(1).topk(3).indices, True)
    assert torch.equal(found, want.reshape(p.shape))
    assert selected("count", 2.0, torch.zeros(1, 300)).nonzero().tolist() == [[0, 0], [0, 1]]


def test_scores_are_the_weights_of_an_attention_whose_heads_share_keys() -> None:
    torch.manual_seed(7)
    q, k = torch.randn(2, 6, 5, 8, dtype=torch.float64), torch.randn(2, 3, 9, 8, dtype=torch.float64)
    b, h, i, j, d = (Index(x) for x in "bhijd")
    y = Load("k", (b, floordiv(h, const(2)), j, d), "float")
    node = Scores(
        (), axes(b=2, h=6), *axes(i=5, j=9, d=8), (tensor("q", 2, 6, 5, 8), tensor("k", 2, 3, 9, 8)),
        Load("q", (b, h, i, d), "float"), y, mul(S, const(0.3)), lt(j, mul(i, const(2))),
    )  # fmt: skip
    s = q @ k.repeat_interleave(2, 1).mT * 0.3
    seen = torch.arange(9) < torch.arange(5)[:, None] * 2
    given = {"q": q, "k": k}
    found = interpret_scores(kind_of(node).verify(node), given, compute=torch.float64)["out"]
    assert_close(found, s.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0.0))
    plain = interpret_scores(replace(node, norm="none"), given, compute=torch.float64)["out"]
    assert_close(plain, torch.where(seen, s, 0.0))
    apart = replace(node, y=Load("k", (b, h, j, d), "float"), tensors=(node.tensors[0], tensor("k", 2, 6, 9, 8)))
    each = interpret_scores(apart, {"q": q, "k": k.repeat_interleave(2, 1)}, compute=torch.float64)["out"]
    assert_close(each, found)


def test_the_mean_of_what_is_seen() -> None:
    (node,) = (n for n in examples() if isinstance(n, Reduce))
    k = torch.arange(48.0).reshape(2, 24, 1)
    found = interpret_reduce(replace(node, tensors=(tensor("k", 2, 24, 1),)), {"k": k}, [4])["out"]
    assert found.tolist() == [1.5, 25.5]
    assert interpret_reduce(node, {"k": torch.zeros(2, 24, 8)}, [0])["out"].tolist() == [-1.0, -1.0]
    whole = replace(node, seen=Const(True))
    assert interpret_reduce(whole, {"k": k}, [4])["out"].tolist() == [11.5, 35.5]
    with pytest.raises(VerifyError, match="a mean is of floats"):
        kind_of(node).verify(replace(node, value=Index("j"), none=const(0)))


def test_merges_are_checked() -> None:
    with pytest.raises(VerifyError, match="gives `out` alone"):
        kind_of(bad := merge_of((), axes(r=2), axes(e=2), 2, how="sum", outputs=("out", "lse"))).verify(bad)
    with pytest.raises(VerifyError, match="a number per branch"):
        kind_of(bad := replace(merge_of((), axes(r=2), axes(e=2), 2), empty=(1.0,))).verify(bad)
    with pytest.raises(VerifyError, match="the tensors are lse0, lse1, out0, out1"):
        kind_of(bad := replace(merge_of((), axes(r=2), axes(e=2), 2), branches=2, tensors=())).verify(bad)
    assert isinstance(bad, Merge)
