"""The interpreter against torch's own attention and against plain torch, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from attentions.dense import B, D, E, H, I, J, attention
from torch.nn.attention.flex_attention import flex_attention

from attncc.ir import Access, Attention, Axis, Index, Load, S, Size, Tensor, W, interpret, verify
from attncc.ir.build import (
    FALSE,
    add,
    and_,
    cast,
    const,
    eq,
    floordiv,
    ge,
    gt,
    le,
    lt,
    minimum,
    mod,
    mul,
    not_,
    op,
    or_,
    sub,
    where,
)
from attncc.ir.expr import Expr

Qkv = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
SHAPE = {"b": 2, "h": 3, "n": 11, "m": 11, "d": 8, "e": 8}


def qkv(dtype: torch.dtype = torch.float64, **changes: int) -> Qkv:
    torch.manual_seed(1)
    x = SHAPE | changes
    b, h, n, m, d, e = (x[name] for name in ("b", "h", "n", "m", "d", "e"))
    return (
        torch.randn(b, h, n, d, dtype=dtype),
        torch.randn(b, h, m, d, dtype=dtype),
        torch.randn(b, h, m, e, dtype=dtype),
    )


def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **changes: object) -> dict[str, torch.Tensor]:
    more = changes.get("tensors", {})
    a = verify(attention(q, k, v, **changes))
    return interpret(a, {"q": q, "k": k, "v": v, **more}, [])  # type: ignore[dict-item]


def check(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def grids(n: int = 11, m: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(n)[:, None], torch.arange(m)[None]


def test_plain() -> None:
    q, k, v = qkv(m=7, e=5)
    check(run(q, k, v)["out"], F.scaled_dot_product_attention(q, k, v))


def test_causal() -> None:
    q, k, v = qkv()
    check(run(q, k, v, mask=le(J, I))["out"], F.scaled_dot_product_attention(q, k, v, is_causal=True))


@pytest.mark.parametrize(
    ("mask", "visible"),
    [
        (and_(le(J, I), lt(sub(I, J), const(3))), lambda i, j: (j <= i) & (i - j < 3)),
        (le(op("abs", sub(I, J)), const(2)), lambda i, j: (i - j).abs() <= 2),
        (eq(floordiv(I, const(4)), floordiv(J, const(4))), lambda i, j: i // 4 == j // 4),
        (eq(mod(sub(I, J), const(3)), const(0)), lambda i, j: (i - j) % 3 == 0),
        (or_(lt(J, const(2)), le(J, I)), lambda i, j: (j < 2) | (j <= i)),
        (not_(and_(ge(J, const(2)), lt(J, const(5)))), lambda i, j: ~((j >= 2) & (j < 5)) & (i >= 0)),
        (op("ne", op("truncdiv", sub(I, J), const(4)), const(1)), lambda i, j: torch.trunc((i - j) / 4) != 1),
    ],
)
def test_index_masks(mask: Expr, visible: object) -> None:
    q, k, v = qkv()
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=visible(*grids()))  # type: ignore[operator]
    check(run(q, k, v, mask=mask)["out"], want)


def test_loaded_masks() -> None:
    q, k, v = qkv()
    torch.manual_seed(2)
    doc, seen = torch.randint(0, 3, (2, 11)), torch.rand(2, 11) > 0.3
    seen[:, 0] = True
    same = eq(Load("doc", (B, I), "int"), Load("doc", (B, J), "int"))
    mask = or_(same, Load("seen", (B, J), "bool"))
    want = (doc[:, :, None] == doc[:, None]) | seen[:, None]
    got = run(q, k, v, mask=mask, tensors={"doc": doc, "seen": seen})["out"]
    check(got, F.scaled_dot_product_attention(q, k, v, attn_mask=want[:, None]))


def test_head_dependent_mask() -> None:
    q, k, v = qkv()
    i, j = grids()
    want = torch.stack([(j <= i) & (i - j <= 2 * h) for h in range(3)])
    got = run(q, k, v, mask=and_(le(J, I), le(sub(I, J), mul(H, const(2)))))["out"]
    check(got, F.scaled_dot_product_attention(q, k, v, attn_mask=want))


def test_bias_and_table() -> None:
    q, k, v = qkv()
    bias, table = torch.randn(3, 11, 11, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    distance = minimum(op("abs", sub(I, J)), const(5))
    score = add(mul(S, const(8**-0.5)), add(Load("bias", (H, I, J), "float"), Load("table", (distance,), "float")))
    i, j = grids()
    want = bias + table[(i - j).abs().clamp(max=5)]
    got = run(q, k, v, score=score, tensors={"bias": bias, "table": table})["out"]
    check(got, F.scaled_dot_product_attention(q, k, v, attn_mask=want))


def test_alibi() -> None:
    q, k, v = qkv()
    slopes = torch.tensor([0.5, 0.25, 0.125], dtype=torch.float64)
    score = add(mul(S, const(8**-0.5)), mul(Load("slope", (H,), "float"), cast(sub(J, I), "float")))
    i, j = grids()
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=slopes[:, None, None] * (j - i))
    check(run(q, k, v, score=score, tensors={"slope": slopes})["out"], want)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_a_score_as_flex_attention_has_it() -> None:
    q, k, v = qkv()

    def softcap(s: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return 3 * torch.tanh(s / 3)

    x = op("div", mul(S, const(8**-0.5)), const(3.0))
    check(run(q, k, v, score=mul(op("tanh", x), const(3.0)))["out"], flex_attention(q, k, v, score_mod=softcap))


@pytest.mark.parametrize("name", ["exp", "log1p", "tanh", "sigmoid", "sqrt", "rsqrt", "erf", "sin", "cos", "round",
                                  "floor", "ceil", "abs", "log"])  # fmt: skip
def test_functions(name: str) -> None:
    q, k, v = qkv()
    positive = add(mul(S, S), const(0.5))
    x = (q @ k.mT) ** 2 + 0.5
    fn = {"erf": torch.special.erf}.get(name, getattr(torch, name))
    check(run(q, k, v, score=op(name, positive))["out"], torch.softmax(fn(x), -1) @ v)


def test_pow_and_isnan() -> None:
    q, k, v = qkv()
    score = where(op("isnan", S), const(0.0), op("pow", op("abs", S), const(1.5)))
    check(run(q, k, v, score=score)["out"], torch.softmax((q @ k.mT).abs() ** 1.5, -1) @ v)


def test_grouped_heads_without_a_copy() -> None:
    q, k, v = qkv(h=6)
    few = k[:, :2], v[:, :2]
    want = F.scaled_dot_product_attention(q, *few, enable_gqa=True)
    shared = floordiv(H, const(3))
    tensors = {"q": q, "k": few[0], "v": few[1]}
    floored = replace(
        attention(q, *few), k=Access("k", (B, shared, J, D)), v=Access("v", (B, shared, J, E))
    )
    check(interpret(verify(floored), tensors)["out"], want)
    hk, g = Axis("hk", const(2)), Axis("g", const(3))
    split = replace(attention(q, *few), batch=(Axis("b", const(2)), hk, g), q=Access(
        "q", (B, add(mul(hk.index, const(3)), g.index), I, D)),
        k=Access("k", (B, hk.index, J, D)), v=Access("v", (B, hk.index, J, E)))  # fmt: skip
    got = interpret(verify(split), tensors)["out"]
    check(got.flatten(1, 2), want)


def test_access_maps_read_windows_flips_and_slices() -> None:
    torch.manual_seed(3)
    x = torch.randn(12, 3 * 4, dtype=torch.float64)
    t = Axis("t", const(3))
    row, key = add(mul(t.index, const(4)), I), add(mul(t.index, const(4)), sub(const(3), J))
    a = Attention(
        sizes=(), batch=(t,), i=Axis("i", const(4)), j=Axis("j", const(4)), d=Axis("d", const(4)),
        e=Axis("e", const(4)), tensors=(Tensor("x", "f64", (const(12), const(12))),), q=Access("x", (row, D)),
        k=Access("x", (key, add(D, const(4)))), v=Access("x", (key, add(E, const(8)))), dtype="f64",
    )  # fmt: skip
    q, k, v = (p.view(3, 4, 4) for p in x.split(4, -1))
    want = F.scaled_dot_product_attention(q, k.flip(1), v.flip(1), scale=1.0)
    check(interpret(verify(a), {"x": x})["out"], want)


def test_sizes_are_given_at_the_call() -> None:
    q, k, v = qkv()
    length = Size("L")
    a = replace(attention(q, k, v, mask=lt(J, length)), sizes=(length,))
    for n in (1, 4, 11):
        want = F.scaled_dot_product_attention(q, k[:, :, :n], v[:, :, :n])
        check(interpret(verify(a), {"q": q, "k": k, "v": v}, [n])["out"], want)
    with pytest.raises(ValueError, match="declares 1 sizes, got 2"):
        interpret(a, {"q": q, "k": k, "v": v}, [1, 2])


ROWS_FROM_3 = ge(I, const(3))


def test_empty_rows_are_zero_under_boolean_masks() -> None:
    q, k, v = qkv()
    visible = grids()[0] >= 3
    got = run(q, k, v, mask=ROWS_FROM_3, empty="zero", outputs=("out", "lse", "weights"))
    check(got["out"][:, :, 3:], F.scaled_dot_product_attention(q, k, v)[:, :, 3:])
    assert torch.equal(got["out"], torch.where(visible, got["out"], 0.0))
    assert not got["weights"][:, :, :3].any()
    assert (got["lse"][:, :, :3] == -torch.inf).all() and got["lse"][:, :, 3:].isfinite().all()


def test_empty_rows_are_the_mean_under_finite_masks() -> None:
    q, k, v = qkv()
    fill = torch.zeros(11, 1, dtype=torch.float64).masked_fill(grids()[0] < 3, torch.finfo(torch.float64).min)
    got = run(q, k, v, mask=ROWS_FROM_3, empty="mean", outputs=("out", "lse", "weights"))
    check(got["out"], torch.softmax(q @ k.mT / 8**0.5 + fill, -1) @ v)
    check(got["out"][:, :, :3], v.mean(2, keepdim=True).expand(2, 3, 3, 8))
    assert (got["lse"][:, :, :3] == -torch.inf).all()


def test_empty_rows_are_nan_under_infinite_masks() -> None:
    q, k, v = qkv()
    fill = torch.where(grids()[0] >= 3, 0.0, -torch.inf)
    got = run(q, k, v, mask=ROWS_FROM_3, empty="nan")["out"]
    want = torch.softmax(q @ k.mT / 8**0.5 + fill, -1) @ v
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13, equal_nan=True)
    assert got[:, :, :3].isnan().all()


@pytest.mark.parametrize("empty", ["zero", "mean", "nan"])
def test_rows_are_only_empty_where_nothing_is_visible(empty: str) -> None:
    q, k, v = qkv()
    got = run(q, k, v, mask=le(J, I), empty=empty)["out"]
    check(got, F.scaled_dot_product_attention(q, k, v, is_causal=True))


def test_a_sink_takes_part_in_the_sum() -> None:
    q, k, v = qkv()
    sinks = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    mask = and_(le(J, I), ROWS_FROM_3)
    got = run(q, k, v, mask=mask, sink=Load("sinks", (H,), "float"), outputs=("out", "lse", "weights"),
              tensors={"sinks": sinks})  # fmt: skip
    i, j = grids()
    logits = (q @ k.mT / 8**0.5).masked_fill(~((j <= i) & (i >= 3)), -torch.inf)
    column = sinks.view(1, 3, 1, 1).expand(2, 3, 11, 1)
    every = torch.softmax(torch.cat([logits, column], -1), -1)[..., :-1]
    check(got["out"], every @ v)
    check(got["weights"], every)
    check(got["lse"], torch.logsumexp(torch.cat([logits, column], -1), -1))
    check(got["lse"][:, :, 0], sinks.expand(2, 3))  # nothing but the sink


def test_lse() -> None:
    q, k, v = qkv()
    check(run(q, k, v, outputs=("lse",))["lse"], torch.logsumexp(q @ k.mT / 8**0.5, -1))


@pytest.mark.parametrize(("name", "fn"), [("sigmoid", torch.sigmoid), ("relu", torch.relu), ("none", lambda x: x)])
def test_pointwise_normalizers(name: str, fn: object) -> None:
    q, k, v = qkv()
    got = run(q, k, v, normalizer=name, mask=and_(le(J, I), ROWS_FROM_3))["out"]
    i, j = grids()
    weights = fn(q @ k.mT / 8**0.5) * ((j <= i) & (i >= 3))  # type: ignore[operator]
    check(got, weights @ v)


def test_weight_expressions_come_after_normalising() -> None:
    q, k, v = qkv()
    gate, keep = torch.rand(2, 3, 11, dtype=torch.float64), torch.rand(11, 11) > 0.2
    gated = op("div", mul(W, Load("gate", (B, H, I), "float")), const(0.8))
    weight = where(Load("keep", (I, J), "bool"), gated, const(0.0))
    got = run(q, k, v, weight=weight, outputs=("out", "weights"), tensors={"gate": gate, "keep": keep})
    weights = torch.softmax(q @ k.mT / 8**0.5, -1) * gate[..., None] * keep / 0.8
    check(got["weights"], weights)
    check(got["out"], weights @ v)


def test_weights_may_use_the_score_again() -> None:
    q, k, v = qkv()
    got = run(q, k, v, weight=mul(W, cast(gt(S, const(0.0)), "float")))["out"]
    x = q @ k.mT
    check(got, (torch.softmax(x / 8**0.5, -1) * (x > 0)) @ v)


@pytest.mark.parametrize("empty", ["zero", "mean", "nan"])
def test_masked_scores_do_not_matter(empty: str) -> None:
    """NaN and infinity in K or in a bias at a masked key leave the output alone."""
    q, k, v = qkv()
    want = run(q, k[:, :, :7], v[:, :, :7])["out"]
    clobbered = k.clone()
    clobbered[:, :, 7], clobbered[:, :, 8] = torch.nan, torch.inf
    bias = torch.zeros(11, dtype=torch.float64)
    bias[9], bias[10] = torch.nan, torch.inf
    score = add(mul(S, const(8**-0.5)), Load("bias", (J,), "float"))
    got = run(q, clobbered, v, score=score, mask=lt(J, const(7)), empty=empty, tensors={"bias": bias})["out"]
    check(got, want)


def test_nothing_visible_at_all() -> None:
    q, k, v = qkv()
    assert not run(q, k, v, mask=FALSE)["out"].any()
    check(run(q, k, v, mask=FALSE, empty="mean")["out"], v.mean(2, keepdim=True).expand_as(q))


def test_dtypes_of_the_results() -> None:
    q, k, v = qkv(torch.bfloat16)
    a = attention(q, k, v, outputs=("out", "lse", "weights"))
    tensors = {"q": q, "k": k, "v": v}
    assert [x.dtype for x in interpret(a, tensors).values()] == [torch.bfloat16, torch.float32, torch.bfloat16]
    wide = interpret(a, tensors, compute=torch.float64)
    assert {x.dtype for x in wide.values()} == {torch.float64}
    check(wide["out"], F.scaled_dot_product_attention(q.double(), k.double(), v.double()))


def test_rounding_points_are_honoured_on_request() -> None:
    q, k, v = qkv(torch.float32)
    a = attention(q, k, v, score=op("bf16", mul(S, const(8**-0.5))), weight=op("bf16", W))
    tensors = {"q": q, "k": k, "v": v}
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    rough = torch.softmax((q @ k.mT * 8**-0.5).bfloat16().float(), -1).bfloat16().float() @ v
    torch.testing.assert_close(interpret(a, tensors)["out"].double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(interpret(a, tensors, rounding=True)["out"], rough)
    assert (rough - exact).abs().max() > 1e-3


def test_gradients_pass_through() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(n=5, m=5, d=3, e=3, h=2))
    bias = torch.randn(2, 5, 5, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)
    gate = torch.rand(5, dtype=torch.float64, requires_grad=True)
    score = add(op("tanh", mul(S, const(0.5))), Load("bias", (H, I, J), "float"))
    changes = {"score": score, "mask": and_(le(J, I), ge(I, const(1))), "sink": Load("sinks", (H,), "float"),
               "weight": mul(W, Load("gate", (I,), "float"))}  # fmt: skip

    def ours(q, k, v, bias, sinks, gate):
        return run(q, k, v, tensors={"bias": bias, "sinks": sinks, "gate": gate}, **changes)["out"]

    def plain(q, k, v, bias, sinks, gate):
        i, j = grids(5, 5)
        x = (torch.tanh(q @ k.mT * 0.5) + bias).masked_fill(~((j <= i) & (i >= 1)), -torch.inf)
        x = torch.cat([x, sinks.view(1, 2, 1, 1).expand(2, 2, 5, 1)], -1)
        return (torch.softmax(x, -1)[..., :-1] * gate[:, None]) @ v

    inputs = (q, k, v, bias, sinks, gate)
    cotangent = torch.randn(2, 2, 5, 3, dtype=torch.float64)
    got = torch.autograd.grad(ours(*inputs), inputs, cotangent)
    want = torch.autograd.grad(plain(*inputs), inputs, cotangent)
    for a, b in zip(got, want, strict=True):
        check(a, b)
    assert torch.autograd.gradcheck(ours, inputs)


@pytest.mark.parametrize("empty", ["zero", "mean"])
def test_gradients_of_empty_rows_are_finite(empty: str) -> None:
    q, k, v = (x.requires_grad_() for x in qkv())
    run(q, k, v, mask=ROWS_FROM_3, empty=empty)["out"].sum().backward()
    for x in (q, k, v):
        assert x.grad is not None and x.grad.isfinite().all()
    assert not q.grad[:, :, :3].any()  # type: ignore[index]


def test_loads_out_of_range_are_errors() -> None:
    q, k, v = qkv()
    bias = torch.zeros(11, dtype=torch.float64)
    for index in (sub(J, const(1)), add(J, const(1))):
        score = add(S, Load("bias", (index,), "float"))
        with pytest.raises(IndexError):
            run(q, k, v, score=score, tensors={"bias": bias})


def test_no_batch_axes_and_single_elements() -> None:
    torch.manual_seed(4)
    q, k, v = (torch.randn(1, 1, dtype=torch.float64) for _ in range(3))
    one = {name: Axis(name, const(1)) for name in "ijde"}
    a = Attention(
        sizes=(), batch=(), **one, tensors=tuple(Tensor(n, "f64", (const(1), const(1))) for n in "qkv"),
        q=Access("q", (Index("i"), Index("d"))), k=Access("k", (Index("j"), Index("d"))),
        v=Access("v", (Index("j"), Index("e"))), dtype="f64",
    )  # fmt: skip
    check(interpret(verify(a), {"q": q, "k": k, "v": v})["out"], v)
