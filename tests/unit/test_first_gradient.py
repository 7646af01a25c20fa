"""A backward kernel is held against the equations before it is used: wrong ones are found, right ones not accused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cpp_kernels.backward import gradient
from cpp_kernels.cases import case
from gradients.equations import Equations

from attncc.ir import Attention, parse_attention, print_attention
from attncc.kernels import first_gradient
from attncc.kernels.first_gradient import gradient_check
from attncc.kernels.first_use import CheckedAtFirst, Untried

FORMS = ["causal", "relative table", "alibi", "padding", "sinks"]


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("form", FORMS)
def test_right_ones_are_not_accused(form: str, dtype: str) -> None:
    g = gradient(case(form, dtype, lse=True))
    assert gradient_check(g).wrong(Equations(g)) is None


@pytest.mark.parametrize("form", ["sinks", *(pytest.param(form, marks=pytest.mark.full) for form in FORMS)])
def test_wrong_ones_are_found(form: str) -> None:
    g = gradient(case(form, lse=True))
    for n in range(len(g.operands) + len(g.loads)):
        why = gradient_check(g).wrong(Equations(g, lambda x, n=n: x[n].view(-1)[-3:].add_(0.25)))
        assert why is not None and "gradient of" in why
        why = gradient_check(g).wrong(Equations(g, lambda x, n=n: x[n].view(-1)[:1].fill_(float("nan"))))
        assert why is not None and "nan" in why


def large() -> Attention:
    text = print_attention(case("causal", lse=True, groups=1)).replace("size   N, M\n", "")
    return parse_attention(text.replace("N", "1024").replace("M", "1024"))


def test_large_ones_are_checked_at_their_first_call_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_gradient, "MOST_WORK", 1 << 28)
    a = large()
    g = gradient(a)
    with pytest.raises(Untried, match="too much"):
        gradient_check(g).wrong(Equations(g))
    random = torch.Generator().manual_seed(0)
    shapes = (2, 1024, 2, 32), (2, 2, 1024, 32), (2, 2, 1024, 32), (2, 2, 1, 1024, 32)
    q, k, v, grad = (torch.randn(n, generator=random) for n in shapes)
    out, lse = torch.ops.attncc.attention([q, k, v], [], print_attention(a))
    call = [q, k, v, grad, out, lse, torch.zeros_like(lse)]
    outputs = [torch.empty(2, 2, 1, 1024, 32), torch.empty(2, 2, 1024, 32), torch.empty(2, 2, 1024, 32)]
    for spoilt in (None, 0, 1, 2):
        told: list[str | None] = []
        wrong = Equations(g) if spoilt is None else Equations(g, lambda x, n=spoilt: x[n].mul_(1.001))
        report: Callable[[str | None], Equations] = lambda why, told=told: told.append(why) or Equations(g)  # noqa: E731
        kernel = CheckedAtFirst(wrong, gradient_check(g).differs, report)
        kernel(call, [], outputs)
        assert len(told) == 1 and (told[0] is None) == (spoilt is None)
