"""`attncc::linear`: kernels behind a text, fakes, gradients of both orders, and what a call must pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attentions.linear_forms import FORMS, data, plain

import attncc  # noqa: F401 - registers the operator
from attncc.ir import Linear, Size, interpret_linear, print_linear, verify_linear
from attncc.ir.build import op
from attncc.kernels.linear import built_linear
from attncc.runtime.op import KernelError


def call(a: Linear, given: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return torch.ops.attncc.linear([given[t.name] for t in a.tensors], [], print_linear(a))


@pytest.fixture(scope="module")
def gated() -> Linear:
    return verify_linear(FORMS["gated_delta"](plain(2, 2, 50, 16, 16)))


def test_it_runs_a_kernel_that_was_checked(gated: Linear) -> None:
    given = data(gated)
    want = interpret_linear(gated, given, compute=torch.float64)
    for name, x in zip(gated.outputs, call(gated, given), strict=True):
        torch.testing.assert_close(x.double(), want[name], atol=1e-5, rtol=1e-4)
    made = built_linear(print_linear(gated), "cpu")
    assert made.language == "cpp", made.reason


def test_what_has_no_kernel_runs_in_plain_torch() -> None:
    a = plain(1, 1, 5, 4, 4)
    a = verify_linear(replace(a, decay=op("exp", op("neg", op("float", a.e.index)))))
    given = data(a)
    torch.testing.assert_close(call(a, given)[0], interpret_linear(a, given)["out"])
    assert "number of the column" in built_linear(print_linear(a), "cpu").reason


def test_gradients_are_those_of_the_recurrence(gated: Linear) -> None:
    given = {n: x.requires_grad_() for n, x in data(gated).items()}
    torch.manual_seed(0)
    seeds = [torch.randn(x.shape) for x in call(gated, given)]
    got = torch.autograd.grad(call(gated, given), list(given.values()), seeds)
    wide = {n: x.detach().double().requires_grad_() for n, x in given.items()}
    want = interpret_linear(gated, wide, compute=torch.float64)
    exact = torch.autograd.grad([want[n] for n in gated.outputs], list(wide.values()), [s.double() for s in seeds])
    for x, y in zip(got, exact, strict=True):
        torch.testing.assert_close(x.double(), y, atol=1e-4, rtol=1e-3)


def test_gradients_of_gradients() -> None:
    a = verify_linear(FORMS["gated_delta"](plain(1, 1, 6, 3, 3, "f64")))
    given = {n: x.requires_grad_() for n, x in data(a).items()}

    def second(run: object) -> list[torch.Tensor]:
        out = run()[0]  # type: ignore[operator]
        (q,) = torch.autograd.grad(out.square().sum(), [given["q"]], create_graph=True)
        return list(torch.autograd.grad(q.square().sum(), [given[n] for n in ("k", "g", "r")]))

    def recurrence() -> list[torch.Tensor]:
        return list(interpret_linear(a, given, compute=torch.float64).values())

    for x, y in zip(second(lambda: call(a, given)), second(recurrence), strict=True):
        torch.testing.assert_close(x, y)


def test_gradients_where_the_call_decides_the_length() -> None:
    a = verify_linear(FORMS["bare"](plain(1, 1, Size("n0"), 3, 3)))
    given = [x.requires_grad_() for x in data(a, 6).values()]
    (out,) = torch.ops.attncc.linear(given, [6], print_linear(a))
    (got,) = torch.autograd.grad(out.sum(), given[:1])
    torch.testing.assert_close(got, (given[2].sum(-1, keepdim=True) * given[1]).cumsum(-2))


def test_traces_and_compiles(gated: Linear) -> None:
    given = data(gated)
    spec = print_linear(gated)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(*tensors: torch.Tensor) -> torch.Tensor:
        return torch.ops.attncc.linear(list(tensors), [], spec)[0] * 2

    torch.testing.assert_close(run(*given.values()), call(gated, given)[0] * 2)


@pytest.mark.parametrize("change", ["dtype", "shape", "count"])
def test_a_call_must_pass_what_the_text_declares(change: str) -> None:
    a = verify_linear(FORMS["bare"](plain(1, 1, 7, 3, 2 + len(change))))
    given = [data(a)[t.name] for t in a.tensors]
    wrong = {"dtype": [given[0].double(), *given[1:]], "shape": [given[0][..., :2], *given[1:]], "count": given[:2]}
    with pytest.raises((ValueError, KernelError), match="declares"):
        torch.ops.attncc.linear(wrong[change], [], print_linear(a))
