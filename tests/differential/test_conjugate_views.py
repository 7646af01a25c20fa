"""Operands that are views with a sign of their own: parts of conjugates, as inputs and inside of a graph."""

from __future__ import annotations

import pytest
import torch

Q = torch.Tensor
SHAPE = (1, 2, 16, 8)


def attend(q: Q, k: Q, v: Q) -> Q:
    return (q @ k.mT / 4).softmax(-1) @ v


def compiled(f: object, *given: Q, inductor: bool = True) -> Q:
    torch._dynamo.reset()
    return torch.compile(f, backend="attncc", options={"measure": False, "inductor": inductor})(*given)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize("place", range(3))
def test_imaginary_parts_of_conjugates_as_inputs(place: int) -> None:
    z = torch.randn(SHAPE, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    given = list(torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1)).unbind(0))
    given[place] = z.conj().imag
    assert given[place].is_neg()
    torch.testing.assert_close(compiled(attend, *given, inductor=place == 0), attend(*given))


def test_their_gradients() -> None:
    z = torch.randn(SHAPE, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    k, v = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1)).unbind(0)
    want = torch.autograd.grad(attend(z.conj().imag, k, v).square().sum(), z)
    got = torch.autograd.grad(compiled(attend, z.conj().imag, k, v).square().sum(), z)
    torch.testing.assert_close(got, want)


def test_conjugates_inside_of_a_graph() -> None:
    def inside(z: Q, k: Q, v: Q) -> Q:
        return attend(z.conj().imag, k, v)

    z = torch.randn(SHAPE, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    k, v = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1)).unbind(0)
    for given in (z, z.conj()):
        torch.testing.assert_close(compiled(inside, given, k, v, inductor=False), inside(given, k, v))


def test_a_write_to_such_an_input_is_not_lost() -> None:
    def writing(q: Q, k: Q, v: Q) -> Q:
        q.mul_(2.0)
        return attend(q, k, v)

    z = torch.randn(SHAPE, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    k, v = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1)).unbind(0)
    ours, theirs = z.clone().conj().imag, z.clone().conj().imag
    torch.testing.assert_close(compiled(writing, ours, k, v), writing(theirs, k, v))
    torch.testing.assert_close(ours, theirs)
