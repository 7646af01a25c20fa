"""What the first call of a compiled model costs: a graph is read once, and one that can hold no attention is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from attncc.driver import capture
from attncc.driver.plain import plain


class Scaled(nn.Module):
    """Attention with numbers of its own, which `dynamic=True` makes inputs of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.eps = 0.3, 1e-6

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return ((x @ x.mT) * self.scale).softmax(-1) @ x


@pytest.mark.slow
@torch.no_grad()
def test_floats_of_the_model_do_not_make_it_read_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    read = capture.read

    def counted(module: fx.GraphModule, inputs: Any) -> capture.Reading:
        reads.append(sum(n.op == "placeholder" for n in module.graph.nodes))
        return read(module, inputs)

    monkeypatch.setattr(capture, "read", counted)
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, x = Scaled().eval(), torch.randn(2, 3, 10, 8)
    compiled = torch.compile(model, backend="attncc", dynamic=True, options={"measure": False})
    for scale in (0.3, 0.7):
        model.scale = scale
        torch.testing.assert_close(compiled(x), model(x))
    assert len(reads) == 2
    # x and its lengths: the floats are numbers in the graph
    assert reads[0] <= 5


def graph_of(function: Callable[..., Tensor], *inputs: Tensor) -> fx.GraphModule:
    found: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        found.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend)(*inputs)
    return found[0]


def residual() -> nn.Module:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.out = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = x + F.relu(self.norm(self.conv(x)), inplace=True)
            x = x * torch.sigmoid(F.adaptive_avg_pool2d(x, 1))
            return self.out(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))

    return Block()


PERCEPTRON = nn.Sequential(nn.Embedding(5, 8), nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
PLAIN: dict[str, tuple[Callable[..., Tensor], Tensor]] = {
    "perceptron": (PERCEPTRON, torch.zeros(2, 3, dtype=torch.int64)), "residual": (residual(), torch.zeros(2, 4, 6, 6)),
}  # fmt: skip
ATTENDS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear over keys": lambda x: F.linear(F.relu(F.linear(x, x)), x.mT),
    "products": lambda x: (x @ x.mT) @ x,
    "element by element": lambda x: (x[:, None] * x[None]).sum(-1),
    "softmax alone": lambda x: x.softmax(-1),
    "library": lambda x: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None])[0, 0],
}


@pytest.mark.parametrize("name", PLAIN)
def test_graphs_without_attention_are_not_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, x = PLAIN[name]
    assert plain(graph_of(function, x))
    monkeypatch.setattr(capture, "read", lambda *_: pytest.fail("the graph was read"))
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="attncc", options={"inductor": False})
    torch.testing.assert_close(compiled(x), function(x))


@pytest.mark.parametrize("name", ATTENDS)
def test_graphs_that_may_hold_attention_are_read(name: str) -> None:
    assert not plain(graph_of(ATTENDS[name], torch.ones(4, 4)))
