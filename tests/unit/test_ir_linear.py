"""Linear attention as IR: its text, what the verifier asks for, and the recurrence against closed and chunked forms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from attncc.ir import (
    Access,
    Axis,
    Const,
    Index,
    Linear,
    Load,
    ParseError,
    Size,
    Tensor,
    VerifyError,
    interpret_linear,
    parse_linear,
    print_linear,
    verify_linear,
)
from attncc.ir.build import ONE, ZERO, add, const, eq, maximum, op, where
from attncc.ir.linear import X, Z
from attncc.ir.linear_chunks import by_chunks, logarithm, unchunked

B, H, N, D, E = 2, 3, 13, 5, 4
b, h, i, j, d, e = (Index(n) for n in "bhijde")
RELU = maximum(X, const(0.0))


def plain() -> Linear:
    def tensor(name: str, last: int) -> Tensor:
        return Tensor(name, "f32", (Const(B), Const(H), Const(N), Const(last)))

    return Linear(
        sizes=(), batch=(Axis("b", Const(B)), Axis("h", Const(H))), i=Axis("i", Const(N)), j=Axis("j", Const(N)),
        d=Axis("d", Const(D)), e=Axis("e", Const(E)), tensors=(tensor("q", D), tensor("k", D), tensor("v", E)),
        q=Access("q", (b, h, i, d)), k=Access("k", (b, h, j, d)), v=Access("v", (b, h, j, e)),
    )  # fmt: skip


def gated() -> Linear:
    """The gated delta rule, from a state, to the last state."""
    scalar = (Const(B), Const(H), Const(N))
    a = plain()
    return replace(
        a, tensors=(*a.tensors, Tensor("g", "f32", scalar), Tensor("r", "f32", scalar),
                    Tensor("s0", "f32", (Const(B), Const(H), Const(D), Const(E)))),
        decay=op("exp", op("neg", Load("g", (b, h, j), "float"))), rate=Load("r", (b, h, j), "float"), rule="delta",
        sees="past", state=Access("s0", (b, h, d, e)), outputs=("out", "state"),
    )  # fmt: skip


def data() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    made = {"q": torch.randn(B, H, N, D), "k": torch.randn(B, H, N, D), "v": torch.randn(B, H, N, E)}
    made |= {"g": torch.rand(B, H, N), "r": torch.rand(B, H, N), "s0": torch.randn(B, H, D, E)}
    made = {name: x.double() for name, x in made.items()}
    return made | {"k": torch.nn.functional.normalize(made["k"], dim=-1)}


def of(a: Linear) -> dict[str, torch.Tensor]:
    given = {t.name: data()[t.name] for t in a.tensors}
    return interpret_linear(verify_linear(a), given, compute=torch.float64)


FORMS = {
    "plain": plain(),
    "features": replace(plain(), phi_q=RELU, phi_k=RELU, over=add(Z, const(1e-6))),
    "past": replace(plain(), sees="past", over=maximum(Z, const(1.0))),
    "gated": gated(),
    "retention": replace(plain(), sees="past", decay=const(0.9)),
    "scan": replace(gated(), rule="add", decay=op("exp", op("neg", Load("g", (b, h, j), "float")))),
}


@pytest.mark.parametrize("name", FORMS)
def test_text_round_trips(name: str) -> None:
    text = print_linear(FORMS[name])
    assert parse_linear(text) == verify_linear(FORMS[name])
    assert print_linear(parse_linear(text)) == text


def test_text() -> None:
    assert print_linear(gated()).splitlines() == [
        "linear", "batch  b = 2, h = 3", "axis   i = 13, j = 13, d = 5, e = 4", "tensor q: f32[2, 3, 13, 5]",
        "tensor k: f32[2, 3, 13, 5]", "tensor v: f32[2, 3, 13, 4]", "tensor g: f32[2, 3, 13]",
        "tensor r: f32[2, 3, 13]", "tensor s0: f32[2, 3, 5, 4]", "q      q[b, h, i, d]", "k      k[b, h, j, d]",
        "v      v[b, h, j, e]", "state  s0[b, h, d, e]", "phi_q  x", "phi_k  x", "decay  exp(-g[b, h, j])",
        "rate   r[b, h, j]", "rule   delta", "sees   past", "give   out, state", "dtype  f32",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new"),
    [("rule   delta", "rule   gamma"), ("linear", "attention"), ("sees   past\n", ""), ("phi_q  x", "phi_q  y"),
     ("dtype  f32", "dtype  f32\nmask   True")],
)  # fmt: skip
def test_other_text_is_refused(old: str, new: str) -> None:
    text = print_linear(gated())
    assert old in text
    with pytest.raises(ParseError):
        parse_linear(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"phi_q": Load("k", (b, h, j, d), "float")}, "phi_q mentions j"),
        ({"decay": X}, "decay mentions x"),
        ({"over": add(Z, Load("q", (b, h, i, ZERO), "float"))}, "over mentions i"),
        ({"sees": "past", "i": Axis("i", Const(N + 1))}, "as many rows as keys"),
        ({"rule": "delta", "over": Z}, "without decay"),
        ({"q": Access("q", (b, h, i))}, "indexes 3 of 4"),
        ({"j": Axis("j", Size("M"))}, "undeclared extent"),
        ({"outputs": ()}, "outputs"),
    ],
)
def test_what_is_malformed(change: dict[str, object], message: str) -> None:
    with pytest.raises(VerifyError, match=message):
        verify_linear(replace(plain(), **change))  # type: ignore[arg-type]


def test_all_is_two_products() -> None:
    x = data()
    torch.testing.assert_close(of(plain())["out"], x["q"] @ (x["k"].mT @ x["v"]))


def test_features_and_their_sum() -> None:
    x = data()
    weights = x["q"].relu() @ x["k"].relu().mT
    want = weights @ x["v"] / (weights.sum(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(of(FORMS["features"])["out"], want)


def test_the_past_is_a_triangle_of_weights() -> None:
    x = data()
    weights = (x["q"] @ x["k"].mT).tril()
    want = weights @ x["v"] / weights.sum(-1, keepdim=True).clamp(min=1.0)
    torch.testing.assert_close(of(FORMS["past"])["out"], want)


def test_a_constant_decay_is_retention() -> None:
    x, at = data(), torch.arange(N)
    decay = torch.where(at[:, None] >= at, 0.9 ** (at[:, None] - at).double(), 0.0)
    torch.testing.assert_close(of(FORMS["retention"])["out"], (x["q"] @ x["k"].mT * decay) @ x["v"])


def by_channel(a: Linear) -> Linear:
    """`a` with a decay for each channel of a key, as gated linear attention and Kimi's delta rule have it."""
    held = tuple(t for t in a.tensors if t.name != "g")
    g = Tensor("gk", "f32", (Const(B), Const(H), Const(N), Const(D)))
    return replace(a, tensors=(*held, g), decay=op("exp", op("neg", Load("gk", (b, h, j, d), "float"))))


def packed(a: Linear) -> Linear:
    """`a` over two documents of a row: the state begins anew at the fifth token."""
    return replace(a, decay=where(eq(j, const(5)), const(0.0), a.decay))


#: What has a form by chunks.
CHUNKED = {
    **{name: FORMS[name] for name in ("plain", "features", "past", "gated", "retention", "scan")},
    "by channel": by_channel(replace(gated(), rule="add")), "delta by channel": by_channel(gated()),
    "packed": packed(gated()), "packed by channel": packed(by_channel(gated())),
    "delta for all": replace(gated(), sees="all"), "grouped": replace(
        gated(), tensors=tuple(replace(t, shape=(Const(B), ONE, *t.shape[2:])) if t.name in "qk" else t
                               for t in gated().tensors),
        q=Access("q", (b, op("floordiv", h, const(H)), i, d)), k=Access("k", (b, op("floordiv", h, const(H)), j, d)),
    ),
}  # fmt: skip


def held_by(a: Linear) -> dict[str, torch.Tensor]:
    made = data()
    made["gk"] = torch.rand(B, H, N, D, generator=torch.Generator().manual_seed(1)).double()
    return {t.name: made[t.name][:, : int(t.shape[1].value)] for t in a.tensors}  # type: ignore[attr-defined]


@pytest.mark.parametrize("chunk", [1, 4, N, 64])
@pytest.mark.parametrize("name", CHUNKED)
def test_chunks_give_what_the_recurrence_gives(name: str, chunk: int) -> None:
    a = verify_linear(replace(CHUNKED[name], outputs=("out", "state")))
    given = held_by(a)
    got = by_chunks(a, given, compute=torch.float64, chunk=chunk)
    for output, want in interpret_linear(a, given, compute=torch.float64).items():
        torch.testing.assert_close(got[output], want)


@pytest.mark.parametrize("name", ["features", "gated", "delta by channel", "packed"])
def test_gradients_by_chunks_are_those_of_the_recurrence(name: str) -> None:
    a = verify_linear(replace(CHUNKED[name], outputs=("out", "state")))
    given = {n: x.requires_grad_() for n, x in held_by(a).items()}

    def gradients(run: Callable[..., dict[str, torch.Tensor]], **more: object) -> tuple[torch.Tensor, ...]:
        found = run(a, given, compute=torch.float64, **more)
        loss = sum((x * torch.linspace(-1, 1, x.numel()).view(x.shape)).sum() for x in found.values())
        return torch.autograd.grad(loss, list(given.values()))  # type: ignore[arg-type]

    for got, want in zip(gradients(by_chunks, chunk=4), gradients(interpret_linear), strict=True):
        torch.testing.assert_close(got, want)


def test_strong_decays_over_a_long_chunk_stay_finite() -> None:
    """exp(-sum of decays) would overflow: only quotients of later products by earlier ones are formed."""
    for a in (gated(), by_channel(gated())):
        given = {n: (x.float() * 40 if n in ("g", "gk") else x.float()) for n, x in held_by(a).items()}
        want = interpret_linear(a, {n: x.double() for n, x in given.items()}, compute=torch.float64)
        for output, x in by_chunks(a, given).items():
            torch.testing.assert_close(x.double(), want[output], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"decay": op("exp", op("float", e))}, "for each column"),
        ({"decay": Load("g", (b, h, j), "float")}, "may be negative"),
        ({"rate": op("float", d)}, "a rate for each channel"),
    ],
)
def test_what_has_no_form_by_chunks(change: dict[str, object], reason: str) -> None:
    a = verify_linear(replace(gated(), **change))  # type: ignore[arg-type]
    assert reason in str(unchunked(a))
    with pytest.raises(ValueError, match=reason):
        by_chunks(a, data())


def test_logarithms_are_taken_apart() -> None:
    g = Load("g", (b, h, j), "float")
    assert logarithm(op("exp", g)) is g
    assert logarithm(op("mul", op("exp", g), const(0.5))) is add(g, op("log", const(0.5)))
    assert logarithm(where(eq(j, ZERO), const(0.0), op("exp", g))) is where(eq(j, ZERO), const(-torch.inf), g)


def test_the_delta_rule_forgets_what_a_key_held() -> None:
    """With a rate of one, reading with the key just written gives its value back."""
    a = replace(gated(), decay=const(1.0), rate=const(1.0), q=Access("k", (b, h, i, d)))
    torch.testing.assert_close(of(a)["out"], data()["v"])
