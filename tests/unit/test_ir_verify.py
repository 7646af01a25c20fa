"""The verifier: each rule alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from attncc.ir import Access, Attention, Axis, Index, Load, S, Size, Tensor, Var, VerifyError, W, verify
from attncc.ir.build import TRUE, add, const, le, mod, op

N, D = Size("N"), const(16)
H, I, J, DD, E = (Index(n) for n in "hijde")  # noqa: E741


def base() -> Attention:
    shape = (const(4), N, D)
    return Attention(
        sizes=(N,),
        batch=(Axis("h", const(4)),),
        i=Axis("i", N),
        j=Axis("j", N),
        d=Axis("d", D),
        e=Axis("e", D),
        tensors=(*(Tensor(n, "bf16", shape) for n in "qkv"), Tensor("bias", "f32", (N,)), Tensor("doc", "i64", (N,))),
        q=Access("q", (H, I, DD)),
        k=Access("k", (H, J, DD)),
        v=Access("v", (H, J, E)),
        score=add(S, Load("bias", (J,), "float")),
        mask=le(Load("doc", (I,), "int"), Load("doc", (J,), "int")),
        dtype="bf16",
    )


def test_a_well_formed_attention_is_given_back() -> None:
    a = base()
    assert verify(a) is a


def changed(**fields: object) -> Callable[[Attention], Attention]:
    return lambda a: replace(a, **fields)  # type: ignore[arg-type]


def with_tensor(*tensors: Tensor) -> Callable[[Attention], Attention]:
    return lambda a: replace(a, tensors=(*a.tensors, *tensors))


def with_axis(name: str, extent: object) -> Callable[[Attention], Attention]:
    return lambda a: replace(a, batch=(*a.batch, Axis(name, extent)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (with_axis("i", const(2)), "a name is declared twice"),
        (with_axis("N", const(2)), "a name is declared twice"),
        (with_axis("bias", const(2)), "a name is declared twice"),
        (with_axis("s", const(2)), "a name is declared twice"),
        (with_axis("b-c", const(2)), "'b-c' cannot be a name"),
        (with_axis("lambda", const(2)), "'lambda' cannot be a name"),
        (with_axis("inf", const(2)), "'inf' cannot be a name"),
        (with_axis("b", const(-1)), "axis b has the extent -1"),
        (with_axis("b", const(2.0)), "axis b has the extent 2.0"),
        (with_axis("b", const(True)), "axis b has the extent True"),
        (with_axis("b", Size("B")), "axis b has an undeclared extent"),
        (with_tensor(Tensor("q", "f32", ())), "a tensor is declared twice"),
        (with_tensor(Tensor("bias", "f32", ())), "a name is declared twice"),
        (with_tensor(Tensor("x", "f8", ())), "tensor x has unknown dtype f8"),
        (with_tensor(Tensor("x", "f32", (Size("B"),))), "the shape of x is integers over sizes"),
        (with_tensor(Tensor("x", "f32", (I,))), "the shape of x is integers over sizes"),
        (with_tensor(Tensor("x", "f32", (const(2.0),))), "the shape of x is integers over sizes"),
        (changed(normalizer="sparsemax"), "normalizer 'sparsemax'"),
        (changed(empty="one"), "empty 'one'"),
        (changed(outputs=()), "outputs"),
        (changed(outputs=("out", "entropy")), "outputs"),
        (changed(outputs=("out", "out")), "outputs"),
        (changed(dtype="i64"), "dtype i64 is no float type"),
        (changed(dtype="f8"), "dtype f8 is no float type"),
        (changed(layout=("h", "i")), "layout is a permutation of"),
        (changed(layout=("h", "i", "j")), "layout is a permutation of"),
        (changed(q=Access("x", (H, I, DD))), "q reads x, which is not declared"),
        (changed(q=Access("doc", (I,))), "q reads i64; operands are floats"),
        (changed(q=Access("q", (H, I))), "q indexes 2 of 3 dims"),
        (changed(q=Access("q", (H, I, const(0.0)))), "an index of q is a float"),
        (changed(q=Access("q", (H, J, DD))), "q mentions j, which it may not"),
        (changed(k=Access("k", (H, I, DD))), "k mentions i, which it may not"),
        (changed(k=Access("k", (H, J, E))), "k mentions e, which it may not"),
        (changed(v=Access("v", (H, J, DD))), "v mentions d, which it may not"),
        (changed(v=Access("v", (H, mod(J, Size("B")), E))), "v mentions B, which it may not"),
        (changed(score=TRUE), "score is a bool, not a float"),
        (changed(score=W), "score mentions w, which it may not"),
        (changed(score=op("float", DD)), "score mentions d, which it may not"),
        (changed(score=Var("z")), "score mentions z, which it may not"),
        (changed(mask=S), "mask is a float, not a bool"),
        (changed(mask=op("lt", S, const(0.0))), "mask mentions s, which it may not"),
        (changed(sink=const(1)), "sink is a int, not a float"),
        (changed(sink=op("float", J)), "sink mentions j, which it may not"),
        (changed(weight=TRUE), "weight is a bool, not a float"),
        (changed(weight=op("float", E)), "weight mentions e, which it may not"),
        (changed(score=Load("x", (J,), "float")), "score loads x, which is not declared"),
        (changed(score=op("float", Load("bias", (J,), "int"))), "score loads bias as int"),
        (changed(score=Load("bias", (I, J), "float")), "score indexes bias with 2 indices"),
        (changed(score=Load("bias", (S,), "float")), "score indexes bias with a float"),
    ],
)
def test_malformed(break_it: Callable[[Attention], Attention], message: str) -> None:
    with pytest.raises(VerifyError, match=message):
        verify(break_it(base()))


def test_sinks_and_weights_may_use_what_they_may() -> None:
    fine = replace(base(), sink=op("float", I), weight=add(op("float", J), add(S, W)), layout=("i", "h", "e"))
    assert verify(fine) is fine
