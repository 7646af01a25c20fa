"""Putting what a function does into the graph of an exported program, as operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode

from attncc import torch_private


def traced_into(graph: fx.Graph, run: Callable[..., Sequence[Any]], given: Sequence[Any]) -> list[Any]:
    """The nodes of what `run` gives for nodes and numbers, made at the insertion point. Each node says what it gives
    (`val`), and so do those that are made."""
    examples = [x.meta["val"] if isinstance(x, fx.Node) else x for x in given]
    mode = detect_fake_mode([x for x in examples if isinstance(x, torch.Tensor)]) or FakeTensorMode()
    traced = torch_private.trace(lambda *values: tuple(run(*values)), mode, examples)
    known: dict[fx.Node, Any] = dict(zip(traced.graph.find_nodes(op="placeholder"), given, strict=True))
    for n in list(traced.graph.find_nodes(op="get_attr")):
        known |= _constant(graph, n, getattr(traced, str(n.target)))
    kept = [n.meta.get("val") if isinstance(n, fx.Node) else None for n in given]
    result: Any = graph.graph_copy(traced.graph, known)
    for n, value in zip(given, kept, strict=True):
        if isinstance(n, fx.Node):
            n.meta["val"] = value
    return list(result)


def _constant(graph: fx.Graph, n: fx.Node, x: torch.Tensor) -> dict[fx.Node, fx.Node]:
    """A small tensor that a trace met, and the copies of it that nothing writes to, as operators."""
    ops = torch.ops.aten
    options = {"dtype": x.dtype, "device": x.device}
    if x.ndim == 0:
        made = graph.call_function(ops.full.default, ([], x.item()), options)
    else:
        assert x.ndim == 1, "a trace meets numbers and lists of them"
        parts = [graph.call_function(ops.full.default, ([1], v), options) for v in x.tolist()]
        made = graph.call_function(ops.cat.default, (parts,))
    found = {n: made}
    for copy in list(n.users):
        if copy.target in (ops.lift_fresh_copy.default, ops.detach_.default):
            found |= dict.fromkeys([copy, *(u for u in copy.users if u.target is ops.detach_.default)], made)
    return found
