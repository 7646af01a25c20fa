"""The score and mask functions of `flex_attention`, graphs of scalars, as a trace can run them.

A float that such a function captures reaches it as a tensor of one element, of which its graph takes the number out
(`item`). Under a trace that is a number that only the data determines, and a graph of scalars may not have one;
Inductor does not compile it either. The tensor itself, in the type that scores are computed in, is the same value.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx


def without_items(args: Sequence[Any]) -> list[Any]:
    """The arguments of a `flex_attention` node, its functions with tensors in the place of captured floats."""
    query, *_ = args
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32

    def function(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(function, x))
        return _with_tensors(x, dtype) if isinstance(x, fx.GraphModule) and any(map(_is_item, x.graph.nodes)) else x

    return [function(x) for x in args]


def _is_item(n: fx.Node) -> bool:
    """Whether a node takes the float out of a tensor that its function captured."""
    if n.op != "call_method" or n.target != "item" or not isinstance(n.args[0], fx.Node):
        return False
    return n.args[0].op == "placeholder" and isinstance(n.meta.get("example_value"), torch.SymFloat)


def _with_tensors(body: fx.GraphModule, dtype: torch.dtype) -> fx.GraphModule:
    made = fx.GraphModule(body, copy.deepcopy(body.graph))
    for n in list(made.graph.nodes):
        if _is_item(n):
            with made.graph.inserting_before(n):
                n.replace_all_uses_with(made.graph.call_method("to", (n.args[0], dtype)))
            made.graph.erase_node(n)
    made.recompile()
    return made
