"""What is converted, as an exported program: one that was loaded, or a model exported now.

Of a model that is called with tensors, two dimensions can be left open: `batch`, the first dimension of the first
tensor, and `length`, its second. Dimensions of the other tensors that have the same extent are taken to be the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map

from attncc.frontends.targets import Target, TargetError, one_line

NAMES = ("batch", "length")


def exported(target: Target, dynamic: Sequence[str] = ()) -> ExportedProgram:
    """The program of a target. `dynamic` are those of `NAMES` that are left open. Raises TargetError."""
    for name in dynamic:
        if name not in NAMES:
            raise TargetError(f"--dynamic {name}: the dimensions that can be left open are {' and '.join(NAMES)}")
    if isinstance(target.model, ExportedProgram):
        if dynamic:
            raise TargetError(f"{target.name}: an exported program has its open dimensions already; drop --dynamic")
        return target.model
    model = target.model
    if isinstance(model, torch.nn.Module):
        model.eval()
    else:
        model = _Calls(model)
    args, kwargs = target.args, target.kwargs
    shapes = None
    try:
        with torch.no_grad():
            if dynamic:
                args, kwargs = _of_two((args, kwargs), dynamic)
                shapes = _shapes((args, kwargs), dynamic)
                shapes = shapes[0] if not kwargs else _by_name(model, shapes)
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except TargetError:
        raise
    except Exception as error:
        raise TargetError(f"{target.name}: torch.export cannot export it ({one_line(error)})") from error


class _Calls(torch.nn.Module):
    """A function as a module."""

    def __init__(self, call: Any) -> None:
        super().__init__()
        self.call = call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


def _extents(inputs: Any, dynamic: Sequence[str]) -> dict[str, tuple[int, int]]:
    """(position, extent) of each open dimension, in the first tensor that has it."""
    found: dict[str, tuple[int, int]] = {}
    for name in dynamic:
        at = NAMES.index(name)
        first = next((x for x in tree_leaves(inputs) if isinstance(x, torch.Tensor) and x.ndim > at), None)
        if first is None:
            raise TargetError(f"--dynamic {name}: no input is a tensor with {at + 1} dimensions")
        found[name] = at, first.shape[at]
    return found


def _of_two(inputs: Any, dynamic: Sequence[str]) -> Any:
    """The inputs, twice along a first dimension of 1 that is left open: torch.export takes 1 for a constant."""
    if "batch" not in dynamic or _extents(inputs, ("batch",))["batch"][1] != 1:
        return inputs

    def twice(x: Any) -> Any:
        return torch.cat([x, x]) if isinstance(x, torch.Tensor) and x.ndim and x.shape[0] == 1 else x

    return tree_map(twice, inputs)


def _shapes(inputs: Any, dynamic: Sequence[str]) -> Any:
    extents = _extents(inputs, dynamic)

    def of(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return None
        found: dict[int, Any] = {}
        for at, n in enumerate(x.shape):
            for place, extent in extents.values():
                if n == extent and (at == place or (place and at)):
                    found[at] = Dim.DYNAMIC if at == place else Dim.AUTO
        return found

    return tree_map(of, inputs)


def _by_name(model: torch.nn.Module, shapes: Any) -> dict[str, Any]:
    """The shapes of arguments under their names, as torch.export asks for them where there are keywords."""
    import inspect  # noqa: PLC0415 only here

    args, kwargs = shapes
    names = list(inspect.signature(model.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def other_inputs(program: ExportedProgram) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Inputs of other sizes for a program with open dimensions: one size more, and about half of it, where the program
    takes them. The values are those of the example inputs, again from the start or cut off."""
    if program.example_inputs is None:
        return []
    symbols = {str(s): (r.lower, r.upper) for s, r in program.range_constraints.items()}
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    for change in (lambda n: n + 1, lambda n: max(2, n // 2)):
        values = iter([
            n.meta.get("val") for n in program.graph.find_nodes(op="placeholder")
            if n.name in program.graph_signature.user_inputs
        ])  # fmt: skip
        changed = False

        def resized(x: Any, values: Any = values, change: Any = change) -> Any:
            nonlocal changed
            fake = next(values, None)
            if not isinstance(x, torch.Tensor) or not isinstance(fake, torch.Tensor):
                return x
            for at, n in enumerate(fake.shape):
                if isinstance(n, torch.SymInt) and str(n) in symbols:
                    low, high = symbols[str(n)]
                    wanted = change(x.shape[at])
                    if low <= wanted <= high and wanted != x.shape[at] and x.shape[at]:
                        x, changed = x.index_select(at, torch.arange(wanted) % x.shape[at]), True
            return x

        inputs = tree_map(resized, program.example_inputs)
        if changed:
            found.append(inputs)
    return found
