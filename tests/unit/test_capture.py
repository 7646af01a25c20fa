"""The shadow of a Dynamo graph: which Dynamo node each traced node belongs to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from attncc.driver import capture


def reading_of(function: Callable[..., Any], *inputs: Any) -> capture.Reading:
    found: list[capture.Reading] = []

    def backend(gm: fx.GraphModule, arguments: list[Any]) -> Any:
        found.append(capture.read(gm, arguments))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, dynamic=True)(*inputs)
    return found[0]


def test_every_node_belongs_to_the_operation_that_made_it() -> None:
    """Sizes computed and never used are gone from the finished trace: what follows must not shift."""

    def grouped(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        b, n, d = x.shape
        for _ in range(3):
            x = x[:, None].expand(b, 2, n, d).reshape(b * 2, n, d)[:b]
        weights = (x @ w).softmax(-1)
        return weights.topk(2).values.sin()

    reading = reading_of(grouped, torch.randn(2, 5, 8), torch.randn(8, 6))
    owners = {str(n.target): reading.owner[n].name for n in reading.shadow.graph.nodes if n in reading.owner}
    assert owners["aten.softmax.int"].startswith("weights")
    assert owners["aten.topk.default"].startswith("topk")
    assert owners["aten.sin.default"].startswith("sin")
