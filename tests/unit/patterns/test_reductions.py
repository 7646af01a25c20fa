"""Sums and maxima along a dimension, powers, and whether two nodes hold the same values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from reading.asked import Asked

from attncc.ir.expr import Index
from attncc.patterns.graph.reductions import _REDUCTIONS, is_maximum, one_dim, reduction, scattered, skip_casts

Q = torch.Tensor
aten = torch.ops.aten

#: What reduces a dimension of three: the operation, the dimension that is found, and whether it is kept.
REDUCED: dict[str, tuple[Callable[[Q], Q], tuple[str, int, bool] | None]] = {
    "kept": (lambda x: x.sum(-1, keepdim=True), ("sum", 2, True)),
    "gone": (lambda x: x.sum(1), ("sum", 1, False)),
    "two dimensions": (lambda x: x.sum((1, 2), keepdim=True), None),
    "a maximum": (lambda x: x.amax(1, keepdim=True), ("max", 1, True)),
    "the first of two results": (lambda x: x.max(1, keepdim=True)[0], ("max", 1, True)),
    "the second of two results": (lambda x: x.max(1, keepdim=True)[1], None),
    "whether any": (lambda x: x.bool().any(0), ("any", 0, False)),
    "whether all": (lambda x: x.bool().all(-1, keepdim=True), ("all", 2, True)),
    "a logarithm": (lambda x: x.logsumexp(-1), ("logsumexp", 2, False)),
    "by its other name": (lambda x: torch.special.logsumexp(x, -1, keepdim=True), ("logsumexp", 2, True)),
    "a mean": (lambda x: x.mean(-1, keepdim=True), None),
}


@pytest.mark.parametrize("name", REDUCED)
def test_the_dimension_that_is_reduced(name: str) -> None:
    reduce, expected = REDUCED[name]
    of = Asked(lambda x: reduce(x), torch.randn(2, 3, 4))
    found = reduction(of.facts, of.results[0])
    assert (None if found is None else (found.op, found.dim, found.kept)) == expected


def test_every_reduction_is_asked_for() -> None:
    asked = {expected[0] for _, expected in REDUCED.values() if expected is not None}
    assert asked == set(_REDUCTIONS.values())


@pytest.mark.parametrize("kept", [False, True])
def test_where_the_source_is_read(kept: bool) -> None:
    of = Asked(lambda x: x.sum(1, keepdim=kept), torch.randn(2, 3, 4))
    found = reduction(of.facts, of.results[0])
    a, b, c, key = (Index(n) for n in ("a", "b", "c", "key"))
    assert found is not None and found.inside((a, b, c) if kept else (a, c), key) == (a, key, c)


def test_what_is_a_maximum() -> None:
    of = Asked(lambda x: (x.amax(-1), x.max(-1)[0], x.max(-1)[1], x.sum(-1)), torch.randn(3, 4))
    assert [is_maximum(n) for n in of.results] == [True, True, False, False]


def test_one_dimension_out_of_a_list() -> None:
    of = Asked(lambda x: x * 1, torch.randn(2, 3, 4))
    x = of.facts.nodes[0]
    assert [one_dim(of.facts, x, d) for d in (-1, [1], [0, 1], (), None)] == [2, 1, None, None, None]


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
