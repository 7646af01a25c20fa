"""What training asks of a graph: which of its nodes need gradients.

A site trains where its output requires a gradient: gradients are on where its call stands in the graph, and a tensor
that reaches it requires one. Dynamo knows both of every node, and compiles a model anew where they change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attncc.driver.capture import Reading
from attncc.driver.site_groups import sources
from attncc.patterns.graph.facts import Facts
from attncc.patterns.site.assemble import Lifted


@dataclass(frozen=True)
class Training:
    """The nodes of a graph whose gradients are wanted, and whether backward runs the graph's forward again (activation
    checkpointing)."""

    nodes: frozenset[fx.Node] = frozenset()
    recomputed: bool = False

    def learned(self, site: Lifted, facts: Facts) -> tuple[str, ...]:
        """The names of the tensors of a site's attention whose gradients are wanted; none where its forward is all."""
        if site.node not in self.nodes:
            return ()
        pairs = zip(site.tensors, site.attention.tensors, strict=True)
        return tuple(
            t.name
            for n, t in pairs
            if n not in site.stopped and not self.nodes.isdisjoint(sources([n], facts))
        )


def training_of(reading: Reading, *, recomputed: bool = False) -> Training:
    """What the captured graph says of gradients, told of the shadow's nodes."""
    found: set[fx.Node] = set()
    for n in reading.shadow.graph.nodes:
        own = reading.origin.get(n)
        if own is not None:
            learns = _learns(own.meta.get("example_value"))
        else:  # a part of a composite call
            owner = reading.owner.get(n)
            learns = (
                owner is not None
                and _learns(owner.meta.get("example_value"))
                and _floating(n.meta.get("val"))
                and any(x in found for x in n.all_input_nodes)
            )
        if learns:
            found.add(n)
    return Training(frozenset(found), recomputed)


def runs_again(module: fx.GraphModule, body: fx.GraphModule) -> bool:
    """Whether `body`, a graph that `module` calls, is a checkpoint of activations: it then runs again in backward."""
    return any(
        str(n.target) == "tag_activation_checkpoint"
        and any(x.op == "get_attr" and getattr(module, str(x.target), None) is body for x in n.all_input_nodes)
        for n in module.graph.nodes
    )


def _learns(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(map(_learns, value))
    return isinstance(value, torch.Tensor) and value.requires_grad


def _floating(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(map(_floating, value))
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point
