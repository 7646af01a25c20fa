"""What a model learned, rather than computes from its input: a product with it is a layer, no comparison."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from torch import fx

from attncc.patterns.reader.pointwise import ELEMENTS
from attncc.patterns.reader.rules import Facts, op_name
from attncc.patterns.reader.view_ops import VIEW_OPS


class Data(Container[fx.Node]):
    """What is computed from tensors that the model is called with, and not from its parameters alone."""

    def __init__(self, f: Facts) -> None:
        self._made = f.made
        self._found: set[fx.Node] = set()
        for n in f.graph.nodes:
            if f.is_number(n):
                continue
            given = n.op == "placeholder" and n not in f.parameters and f.is_tensor(n)
            made_of = n.all_input_nodes[:1] if picks_matrices(f, n) else n.all_input_nodes
            if given or any(x in self._found for x in made_of):
                self._found.add(n)

    def __contains__(self, n: object) -> bool:
        made_of = n.all_input_nodes if isinstance(n, fx.Node) and n in self._made else ()
        return n in self._found or any(x in self for x in made_of)


def is_learned(f: Facts, n: fx.Node) -> bool:
    """Whether a tensor is a parameter seen through views and casts, or matrices picked out of one (of experts)."""
    while n.op == "call_function" and n.all_input_nodes:
        if not (n.target in VIEW_OPS or n.target in ELEMENTS or picks_matrices(f, n)):
            break
        n = n.all_input_nodes[0]
    return n in f.parameters or n.op == "get_attr"


def picks_matrices(f: Facts, n: fx.Node) -> bool:
    """Whether a node picks whole matrices out of a tensor, by their numbers."""
    source = n.args[0] if n.args else None
    if not isinstance(source, fx.Node) or not f.is_tensor(source):
        return False
    name = op_name(n)
    if name == "index":
        numbers: Any = n.args[1]
        return f.rank(source) - len(numbers) >= 2 and all(isinstance(x, fx.Node) for x in numbers)
    return name == "index_select" and f.rank(source) >= 3
