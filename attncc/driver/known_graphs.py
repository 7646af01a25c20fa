"""Graphs that an earlier process compiled, recognised: a digest of everything that reading and deciding look at.

Equal digests mean equal edits, so whatever is not known to be the same is no part of a digest: a graph that holds
anything else than plain torch on plain tensors of fixed shapes on the CPU, or in which gradients are wanted, has none,
and is read each time. Of attncc's own code the names, sizes and times of the files count, as for Python's bytecode.
"""

from __future__ import annotations

import builtins
import hashlib
import math
import operator
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor

from attncc.kernels.build import default_store, target_of
from attncc.runtime.measure import generation, settings
from attncc.torch_private import state
from attncc.version import __version__

_C: Any = torch._C
#: Where the functions that a graph calls have their names.
_SPACES: tuple[tuple[str, Any], ...] = (
    ("torch", torch), ("torch.nn.functional", torch.nn.functional), ("torch._C._nn", _C._nn),
    ("operator", operator), ("math", math), ("builtins", builtins), ("torch.special", torch.special),
    ("torch.linalg", torch.linalg), ("torch._C", _C),
)  # fmt: skip
_OWN_OPERATORS = ("aten", "prims")
#: Variables of the environment that change where things are kept or what is said, not what is made.
_APART = ("ATTNCC_CACHE_DIR", "ATTNCC_STRICT", "ATTNCC_COMPILE_TIMEOUT")
_NAMED = (torch.dtype, torch.device, torch.layout, torch.memory_format)
_PLAIN = (type(None), bool, int, str, type(...))


class UnknownError(Exception):
    """Something whose meaning its text does not tell."""


def digest(gm: fx.GraphModule, inputs: Sequence[Any], **options: bool) -> str | None:
    """What a Dynamo graph, its inputs, the options and all that surrounds it come to; None where that is not known."""
    try:
        found = hashlib.sha256(repr(_surroundings(sorted(options.items()))).encode())
        memories: dict[int, int] = {}
        for x in inputs:
            found.update(repr(_input(x)).encode())
        for n in gm.graph.nodes:
            found.update(repr(_node(n, memories)).encode())
    except UnknownError:
        return None
    return found.hexdigest()


def name_of(target: Any) -> str:
    """The name by which `target_named` finds what a node calls. Raises UnknownError for what is not torch's own."""
    if isinstance(target, str):
        return f".{target}"
    if isinstance(target, OpOverload):
        if target.namespace not in (*_OWN_OPERATORS, "attncc"):
            raise UnknownError(str(target))
        return f"::{target}"
    name = getattr(target, "__name__", None)
    for space, module in _SPACES if isinstance(name, str) else ():
        if getattr(module, str(name), None) is target:
            return f"{space}:{name}"
    raise UnknownError(repr(target))


def target_named(name: str) -> Any:
    """What `name_of` gave the name of."""
    if name.startswith("."):
        return name[1:]
    if name.startswith("::"):
        space, packet, overload = name[2:].split(".")
        return getattr(getattr(getattr(torch.ops, space), packet), overload)
    space, _, function = name.partition(":")
    return getattr(dict(_SPACES)[space], function)


def _surroundings(options: object) -> object:
    """All but the graph that decides what becomes of it."""
    cpu = torch.device("cpu")
    target, torch_state = target_of(cpu), [(x.name, x.read()) for x in state.settings()]
    if dict(torch_state)["torch function modes"] or dict(torch_state)["transforms"]:
        raise UnknownError("modes")
    return (
        __version__, own_code(), torch.__version__, sys.version, platform.machine(), options, torch_state,
        torch.is_inference_mode_enabled(), settings(cpu), target.arch, target.missing,
        None if target.toolchain is None else (target.toolchain.version, target.toolchain.identity),
        sorted((k, v) for k, v in os.environ.items() if k.startswith("ATTNCC_") and k not in _APART),
        generation(default_store()), str(Path.cwd()),
    )  # fmt: skip


@cache
def own_code() -> str:
    """A digest of the names, sizes and times of attncc's files."""
    home = Path(__file__).parents[1]
    found = [x for folder in ("", "codegen", "passes", "patterns", "runtime") for x in _files(str(home / folder))]
    return hashlib.sha256(repr(sorted(found)).encode()).hexdigest()


def _files(folder: str) -> Iterator[tuple[str, int, int]]:
    with os.scandir(folder) as entries:
        for x in entries:
            if x.is_dir(follow_symlinks=False):
                yield from () if x.name == "__pycache__" else _files(x.path)
            elif x.is_file():
                found = x.stat()
                yield x.path, found.st_size, found.st_mtime_ns


def _input(x: Any) -> object:
    if type(x) not in (torch.Tensor, torch.nn.Parameter):
        raise UnknownError(type(x).__name__)
    if x.requires_grad and torch.is_grad_enabled():
        raise UnknownError("gradients")
    return type(x).__name__, _layout(x)


def _layout(x: torch.Tensor) -> object:
    lengths = (*x.shape, *x.stride(), x.storage_offset()) if x.layout == torch.strided else (None,)
    if x.device.type != "cpu" or any(type(n) is not int for n in lengths) or x.is_nested:
        raise UnknownError("layout")
    return x.dim(), lengths, x.dtype, x.requires_grad, x.is_conj(), x.is_neg(), x.is_inference()


def _node(n: fx.Node, memories: dict[int, int]) -> object:
    if n.op not in ("placeholder", "call_function", "call_method", "output"):
        raise UnknownError(n.op)
    named = name_of(n.target) if n.op.startswith("call") else str(n.target)
    if named.startswith("::attncc"):
        raise UnknownError(named)
    stack = n.meta.get("nn_module_stack")
    path = list(stack.values())[-1][0] if stack else ""
    return (
        n.op, n.name, named, _argument(n.args), _argument(n.kwargs), _value(n.meta.get("example_value"), memories),
        path, n.meta.get("stack_trace"),
    )  # fmt: skip


def _value(x: Any, memories: dict[int, int]) -> object:
    if isinstance(x, torch.Tensor):
        if type(x) not in (FakeTensor, torch.nn.Parameter) or not isinstance(x, FakeTensor):
            raise UnknownError(type(x).__name__)
        memory = memories.setdefault(x.untyped_storage()._cdata, len(memories))
        return _layout(x), memory, isinstance(x, torch.nn.Parameter)
    if isinstance(x, tuple | list):
        return type(x).__name__, [_value(y, memories) for y in x]
    return _argument(x)


def _argument(x: Any) -> object:
    """An argument of a node as plain values whose `repr` tells them apart."""
    if isinstance(x, fx.Node):
        return fx.Node, x.name
    if isinstance(x, tuple | list):
        return type(x).__name__, [_argument(y) for y in x]
    if isinstance(x, Mapping):
        return "dict", [(str(k), _argument(y)) for k, y in x.items()]
    if isinstance(x, slice):
        return "slice", [_argument(y) for y in (x.start, x.stop, x.step)]
    if type(x) in _PLAIN or type(x) is float:
        return x
    if isinstance(x, _NAMED):
        return type(x).__name__, str(x)
    if isinstance(x, ModuleType):
        return "module", x.__name__
    raise UnknownError(type(x).__name__)
