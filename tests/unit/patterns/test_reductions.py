"""Sums and maxima along a dimension, powers, and whether two nodes hold the same values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from reading.asked import Asked

from attncc.patterns.graph.reductions import (
    MAXES,
    SUMS,
    alike,
    exponent,
    is_maximum,
    one_dim,
    reduction,
    scattered,
    skip_casts,
)

Q = torch.Tensor
aten = torch.ops.aten

#: What reduces the last of three dimensions, and the dimension that is found: none where it is not put back.
REDUCED: dict[str, tuple[Callable[[Q], Q], int | None]] = {
    "kept": (lambda x: x.sum(-1, keepdim=True), 2),
    "put back": (lambda x: x.sum(2).unsqueeze(-1), 2),
    "put back in another place": (lambda x: x.sum(2).unsqueeze(0), None),
    "not put back": (lambda x: x.sum(2), None),
    "two dimensions": (lambda x: x.sum((1, 2), keepdim=True), None),
    "a maximum": (lambda x: x.amax(1, keepdim=True), 1),
    "the first of two results": (lambda x: x.max(1, keepdim=True)[0], 1),
    "cast after": (lambda x: x.amax(-1, keepdim=True).to(torch.float64), 2),
    "cast between": (lambda x: x.sum(0).double().unsqueeze(0), 0),
    "a mean": (lambda x: x.mean(-1, keepdim=True), None),
}


@pytest.mark.parametrize("name", REDUCED)
def test_the_dimension_that_is_reduced(name: str) -> None:
    reduce, dim = REDUCED[name]
    of = Asked(lambda x: reduce(x), torch.randn(2, 3, 4))
    found = reduction(of.facts, of.results[0], (*SUMS, *MAXES))
    assert (None if found is None else found[2]) == dim
    assert found is None or found[1] is of.facts.nodes[0]


def test_powers_and_their_bases() -> None:
    of = Asked(lambda x: (x.exp(), x.exp2(), 3.0**x, x.clone().exp_(), x**2, (-2.0) ** x), torch.randn(3))
    assert [None if e is None else e[1] for e in map(exponent, of.results)] == [None, 2.0, 3.0, None, None, None]
    assert [e is not None for e in map(exponent, of.results)] == [True, True, True, True, False, False]


def test_what_is_a_maximum() -> None:
    of = Asked(lambda x: (x.amax(-1), x.max(-1)[0], x.max(-1)[1], x.sum(-1)), torch.randn(3, 4))
    assert [is_maximum(n) for n in of.results] == [True, True, False, False]


def test_one_dimension_out_of_a_list() -> None:
    of = Asked(lambda x: x * 1, torch.randn(2, 3, 4))
    x = of.facts.nodes[0]
    assert [one_dim(of.facts, x, d) for d in (-1, [1], [0, 1], (), None)] == [2, 1, None, None, None]


def test_nodes_that_hold_the_same() -> None:
    def call(x: Q) -> tuple[Q, ...]:
        y = x.clone()
        first, second = y.exp(), y.exp()
        y.mul_(2.0)
        return first, second, y.exp(), x.exp2()

    of = Asked(call, torch.randn(3))
    f, (first, second, later, other) = of.facts, of.results
    assert alike(f, first, first, second, second)
    assert not alike(f, first, first, later, later)
    assert not alike(f, first, first, other, other)


def test_what_casts_and_copies_hide() -> None:
    of = Asked(lambda x: x.exp().double().clone().detach(), torch.randn(3))
    kept = skip_casts(of.results[0])
    assert kept is not None and kept.target is aten.exp.default


def test_sums_by_group() -> None:
    def call(x: Q, group: Q) -> Q:
        total = torch.zeros(3).scatter_add(0, group, x) + 1e-6
        return x / total[group]

    of = Asked(call, torch.randn(6), torch.tensor([0, 1, 2, 0, 1, 2]))
    division = of.results[0]
    assert scattered(division.args[1]) is of.facts.nodes[0]  # type: ignore[arg-type]
    assert scattered(division.args[0]) is None  # type: ignore[arg-type]
