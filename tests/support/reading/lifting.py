"""What a model's graph is read from, and what its nodes hold: lifting without compiling."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from attncc.driver import capture
from attncc.patterns.graph.facts import Facts

Q = torch.Tensor


def read(model: nn.Module, *inputs: Q, dynamic: bool = False) -> tuple[Facts, fx.GraphModule, list[Any]]:
    """Facts, the shadow and real inputs of the one graph that Dynamo makes of a model."""
    seen: list[tuple[Facts, fx.GraphModule, list[Any]]] = []

    def backend(gm: fx.GraphModule, given: Any) -> Any:
        reading = capture.read(gm, given)
        seen.append((reading.facts(), reading.shadow, list(given)))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend, dynamic=dynamic)(*inputs)
    torch._dynamo.reset()
    (found,) = seen
    return found


def values(shadow: fx.GraphModule, inputs: list[Any]) -> dict[str, Any]:
    """What each node of a shadow holds on these inputs, in float64."""

    class Keeping(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            found[n.name] = result = super().run_node(n)
            return result

    def real(x: Any) -> Any:
        if isinstance(x, torch.SymInt):
            return x.node.hint
        return x.double() if isinstance(x, Q) and x.is_floating_point() else x

    found: dict[str, Any] = {}
    Keeping(shadow).run(*(real(x) for x in inputs))
    return found
