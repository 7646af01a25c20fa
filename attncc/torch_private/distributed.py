"""Operators on distributed tensors (DTensor): who answers for them, and the tensors taken apart and put together."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

#: (operator, arguments, keyword arguments) -> result, on distributed tensors.
Handler = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


def is_distributed(x: object) -> bool:
    """Whether a value is a distributed tensor; nothing is imported to find out."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


#: What takes distributed tensors apart, puts them together or moves them, in the graphs of Dynamo.
_CROSSINGS = ("from_local", "to_local", "redistribute", "full_tensor")


def crosses(n: fx.Node) -> bool:
    """Whether a Dynamo node leads from plain to distributed tensors, back, or between placements."""
    name = n.target if isinstance(n.target, str) else getattr(n.target, "__name__", "")
    values = (x.meta.get("example_value") for x in (n, *n.all_input_nodes))
    return name in _CROSSINGS and any(map(is_distributed, values))


def whole_fake(x: Any) -> Any:
    """A plain fake tensor of the shape and strides that a fake distributed tensor has as a whole; others as they
    are."""
    if not is_distributed(x) or not isinstance(x._local_tensor, FakeTensor):
        return x
    with x._local_tensor.fake_mode:
        made = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=x.device)
    return made.requires_grad_(x.requires_grad)


def answer_for(handlers: dict[Any, Handler]) -> None:
    """Let operators that DTensor has no strategy for be run by handlers of their own, from now on."""
    from torch.distributed.tensor import DTensor  # noqa: PLC0415 - a second, which few need

    dispatcher: Any = DTensor._op_dispatcher  # pyright: ignore[reportPrivateUsage, reportUnknownMemberType, reportUnknownVariableType, reportAttributeAccessIssue]
    dispatcher._custom_op_handlers.update(handlers)


def mesh_of(tensors: Sequence[object]) -> Any:
    """The device mesh of the first distributed tensor."""
    return next(x.device_mesh for x in tensors if is_distributed(x))  # type: ignore[attr-defined]


def coordinate(mesh: Any) -> list[int]:
    """Where this process is in a mesh."""
    return [int(mesh.get_local_rank(d)) for d in range(mesh.ndim)]


def shard_dims(x: object, mesh: Any) -> list[int | None]:
    """For each dimension of the mesh, the one of the tensor that is cut along it; None where it is not cut evenly."""
    placements: Any = getattr(x, "placements", [None] * mesh.ndim)
    return [p.dim if p is not None and type(p).__name__ == "Shard" else None for p in placements]


def local_part(x: Any, mesh: Any, dims: Sequence[int | None]) -> torch.Tensor:
    """The part of a tensor that this process has once it is cut along `dims`, one per dimension of the mesh; a plain
    tensor is the same everywhere."""
    from torch.distributed.tensor import DTensor, Replicate, Shard  # noqa: PLC0415 - as above

    if not is_distributed(x):
        x = DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
    placements = [Replicate() if d is None else Shard(d) for d in dims]
    return x.redistribute(mesh, placements).to_local()


def whole_of(part: torch.Tensor, mesh: Any, dims: Sequence[int | str | None]) -> torch.Tensor:
    """The distributed tensor that the processes' parts are; "sum" for a dimension of the mesh along which they add
    up."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard  # noqa: PLC0415 - as above

    placements = [Partial() if d == "sum" else Replicate() if d is None else Shard(int(d)) for d in dims]
    return DTensor.from_local(part, mesh, placements, run_check=False)
