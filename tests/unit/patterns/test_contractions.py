"""Each row of the table of products: what the reader says an element is, by the maps of both factors, against eager."""

from __future__ import annotations

from random import Random

import pytest
import torch
from reading.asked import Asked, asked, mistakes
from reading.products import samples
from torch._ops import OpOverload

from attncc.patterns.graph.facts import Facts
from attncc.patterns.reader.contractions import _LAYERS, _RULES, contraction, mixture, swapped


def named(target: OpOverload) -> object:
    return pytest.param(target, id=str(target).removeprefix("aten."))


PRODUCTS, LAYERS = list(map(named, _RULES)), list(map(named, _LAYERS))


def check(target: OpOverload, count: int, seed: int) -> None:
    found = samples(target, count, seed)
    assert len(found) == count, "too few calls that torch accepts: give them in support/reading/products.py"
    wrong, read = mistakes(found, Random(seed))
    assert not wrong, "\n".join(wrong)
    assert read, "no call was read by the rule"


@pytest.mark.parametrize("target", PRODUCTS)
def test_value_is_eager(target: OpOverload) -> None:
    check(target, count=8, seed=0)


@pytest.mark.full
@pytest.mark.parametrize("target", PRODUCTS)
def test_many_values_are_eager(target: OpOverload) -> None:
    check(target, count=100, seed=1)


@pytest.mark.parametrize("target", LAYERS)
def test_a_layer_over_few_channels_is_a_product(target: OpOverload) -> None:
    found = samples(target, 8)
    assert len(found) == 8
    of, read = asked(found), 0
    for sample, n in zip(found, of.results, strict=True):
        product = mixture(of.facts, n)
        if product is None:
            continue
        read += 1
        bias = sample.args[2]
        shape = (-1, *[1] * (0 if product.bias_dim is None else n.meta["val"].dim() - 2))
        want = of.held()[n.name] - (0 if bias is None else bias.view(shape))
        torch.testing.assert_close(of.product(product), want.double(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(of.product(swapped(product)), want.double(), rtol=1e-5, atol=1e-5)
    assert read > 3


def test_a_product_through_learned_weights_is_one_of_two_tensors() -> None:
    def call(q: torch.Tensor, w: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bid,de,bje->bij", q, w, k)

    of = Asked(call, torch.randn(2, 3, 4), torch.randn(4, 5), torch.randn(2, 6, 5))
    inputs = [n for n in of.facts.nodes if n.op == "placeholder"]
    of.facts = Facts(of.module.graph, parameters=frozenset({inputs[1]}))
    (n,) = of.results
    product = contraction(of.facts, n)
    assert product is not None and {product.lhs, product.rhs} & {inputs[0], inputs[2]}
    answer = of.answer(n, *of.plain(n))
    assert answer.right and not answer.loaded
