"""How a result lies in memory, and who notices."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import pytest
import torch
from reading.asked import Asked

from attncc.patterns.graph.strides import noticed, order_in_memory

Q = torch.Tensor


def test_the_order_is_the_one_in_which_elements_lie() -> None:
    for order in permutations(range(4)):
        x = torch.randn(2, 3, 4, 5).permute(order)
        assert x.permute(order_in_memory(x)).is_contiguous()
    assert order_in_memory(torch.randn(3, 1, 4)) == (0, 1, 2)
    assert order_in_memory(torch.randn(3, 4).mT) == (1, 0)


#: What a model does with a result of shape (2, 3, 4), and whether that shows how it lies.
USES: dict[str, tuple[Callable[[Q], Q], bool]] = {
    "it leaves the graph": (lambda x: x, True),
    "a view joins dimensions": (lambda x: x.view(2, 12) @ torch.ones(12, 2), True),
    "a view takes dimensions apart": (lambda x: x.view(2, 3, 2, 2) @ torch.ones(2, 2), False),
    "a reshape joins them": (lambda x: x.reshape(2, 12) @ torch.ones(12, 2), False),
    "a product": (lambda x: x @ torch.ones(4, 2), False),
    "a product of what is computed of it": (lambda x: (x * 2).relu() @ torch.ones(4, 2), False),
    "it leaves the graph after that": (lambda x: (x * 2).relu(), True),
    "a write in place": (lambda x: x.mul_(2) @ torch.ones(4, 2), True),
    "its strides are read": (lambda x: torch.as_strided(x, (2, 3), (12, 4)) @ torch.ones(3, 2), True),
    "a contiguous copy": (lambda x: x.contiguous() @ torch.ones(4, 2), False),
    "a transposed product": (lambda x: x.transpose(0, 1) @ torch.ones(4, 2), False),
}


@pytest.mark.parametrize("use", USES)
def test_whether_it_is_noticed(use: str) -> None:
    then, seen = USES[use]
    of = Asked(lambda x: then(torch.tanh(x)), torch.randn(2, 3, 4))
    result = next(n for n in of.facts.nodes if n.target is torch.ops.aten.tanh.default)
    assert noticed(of.facts, result) is seen
