"""Example values of nodes that were put into a Dynamo graph."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from types import BuiltinFunctionType
from typing import Any

import torch
from torch import fx

from attncc import torch_private


def give_examples(graph: fx.Graph) -> None:
    """Let nodes that were put into a Dynamo graph have example values, as its own nodes have them: AOTAutograd's cache
    on disk passes over a graph with a method of anything else, and a warm start then lowers all of it again.

    What cannot be worked out stays without."""
    modes = (getattr(n.meta.get("example_value"), "fake_mode", None) for n in graph.nodes)
    mode: Any = next((m for m in modes if m is not None), None)
    if mode is None:
        return
    quiet = nullcontext() if mode.shape_env is None else mode.shape_env.suppress_guards()
    with mode, quiet, torch.no_grad(), torch_private.unobserved():
        for n in graph.nodes:
            if n.op not in ("call_function", "call_method") or n.meta.get("example_value") is not None:
                continue
            if _computes(n.target):
                with suppress(Exception):
                    n.meta["example_value"] = _example(n)


def _computes(target: Any) -> bool:
    """Whether a node of this target makes a value and does nothing else."""
    if isinstance(target, str):
        return not target.endswith("_")
    if isinstance(target, torch._ops.OpOverload):
        return not target._schema.is_mutable
    if getattr(target, "__module__", None) == "_operator":
        return target.__name__ in ("getitem", "add", "sub", "mul", "floordiv", "mod", "neg", "truediv")
    name = getattr(target, "__name__", "")
    public = isinstance(target, BuiltinFunctionType) and getattr(torch, name, None) is target
    return public and not name.startswith(("_", "set_")) and not name.endswith("_")


class _Unknown(Exception):
    """A node without an example value."""


def _example(n: fx.Node) -> Any:
    def value(x: fx.Node) -> Any:
        found = x.meta.get("example_value")
        if found is None:
            raise _Unknown(x.name)
        return found

    args, kwargs = fx.map_arg((n.args, dict(n.kwargs)), value)  # type: ignore[misc]
    call: Any = getattr(args[0], n.target) if isinstance(n.target, str) else n.target
    return call(*args[1:], **kwargs) if isinstance(n.target, str) else call(*args, **kwargs)
