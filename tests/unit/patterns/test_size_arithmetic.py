"""Numbers that a graph computes from its sizes: the expression is what eager computes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reading.asked import Asked

Q = torch.Tensor
FORMS: dict[str, Callable[[int, int], Any]] = {
    "a size": lambda n, m: n,
    "a sum": lambda n, m: n + 2 * m - 1,
    "a product": lambda n, m: n * m,
    "a root": lambda n, m: math.sqrt(n),
    "one by a root": lambda n, m: n**-0.5,
    "a power": lambda n, m: n**0.25,
    "a quotient": lambda n, m: n / m,
    "a whole quotient": lambda n, m: (n + 3) // 2,
    "a rest": lambda n, m: (n + 3) % 4,
    "a logarithm": lambda n, m: math.log(n),
    "a logarithm by another": lambda n, m: math.log(n) / math.log(m),
    "a binary logarithm": lambda n, m: math.log2(n),
    "an exponential": lambda n, m: math.exp(-n / 10),
    "a tanh": lambda n, m: math.tanh(n / m),
    "a sine": lambda n, m: math.sin(n) + math.cos(m),
    "a maximum": lambda n, m: max(n, m),
    "a minimum": lambda n, m: min(n, 3) / 2,
    "a square": lambda n, m: n**2,
    "a float of a size": lambda n, m: float(n) * 0.5,
}


@pytest.mark.parametrize("form", FORMS)
def test_a_factor_of_sizes_is_read(form: str) -> None:
    def call(x: Q, y: Q) -> Q:
        return x * FORMS[form](x.shape[0], y.shape[0])

    of = Asked(call, torch.randn(5, 3), torch.randn(7, 3), symbolic=True)
    (n,) = of.results
    answer = of.answer(n, *of.plain(n))
    assert answer.right, answer.value
    assert not answer.loaded
