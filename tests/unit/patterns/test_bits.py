"""Bits of integers: the expression is what eager computes, and nothing is loaded that is a formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from reading.asked import Asked

Q = torch.Tensor
FORMS: dict[str, Callable[[Q, Q], Q]] = {
    "low bits": lambda i, c: i & 3,
    "one bit": lambda i, c: i & 4,
    "bits in two runs": lambda i, c: i & 0b1011,
    "bits of a difference": lambda i, c: (i - 9) & 7,
    "bits of a number below zero": lambda i, c: -i & 6,
    "bits added": lambda i, c: i | 5,
    "bits turned": lambda i, c: i ^ 6,
    "a number first": lambda i, c: 12 & i,
    "to the right": lambda i, c: (i - 9) >> 2,
    "to the left": lambda i, c: (i - 9) << 3,
    "truth values as numbers": lambda i, c: (i > 4).long() & (i < 11).long(),
    "either": lambda i, c: (i > 14).int() | (i < 3).int(),
    "one of the two": lambda i, c: (i > 4).long() ^ (i < 11).long(),
}


@pytest.mark.parametrize("form", FORMS)
def test_bits_are_read_as_arithmetic(form: str) -> None:
    of = Asked(lambda c: FORMS[form](torch.arange(20), c), torch.arange(20))
    (n,) = of.results
    answer = of.answer(n, *of.plain(n))
    assert answer.right, answer.value
    assert not answer.loaded


@pytest.mark.parametrize("form", [lambda c: c & -4, lambda c: c & c.flip(0), lambda c: c ^ 0b101010101010])
def test_others_are_loaded(form: Callable[[Q], Q]) -> None:
    of = Asked(form, torch.arange(20))
    (n,) = of.results
    assert of.answer(n, *of.plain(n)).right
