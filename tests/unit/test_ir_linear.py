"""Linear attention as IR: its text, what the verifier asks for, and the recurrence against closed and chunked forms."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attentions.linear_chunked import by_chunks

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
from attncc.ir.build import ZERO, add, const, maximum, op
from attncc.ir.linear import X, Z

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


@pytest.mark.parametrize("chunk", [1, 4, N, 64])
@pytest.mark.parametrize("name", ["gated", "scan", "retention"])
def test_chunks_give_what_the_recurrence_gives(name: str, chunk: int) -> None:
    a = replace(FORMS[name], outputs=("out", "state"))
    got = by_chunks(a, data(), chunk)
    for output, want in of(a).items():
        torch.testing.assert_close(got[output], want)


def test_the_delta_rule_forgets_what_a_key_held() -> None:
    """With a rate of one, reading with the key just written gives its value back."""
    a = replace(gated(), decay=const(1.0), rate=const(1.0), q=Access("k", (b, h, i, d)))
    torch.testing.assert_close(of(a)["out"], data()["v"])
