"""Operators on distributed tensors (DTensor): who answers for them, and the tensors taken apart and put together."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
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


class Group:
    """A group of processes and this one's place in it."""

    def __init__(self, group: Any) -> None:
        import torch.distributed as dist  # noqa: PLC0415 - a second, which few need

        self.dist: Any = dist
        self.group = group
        self.rank, self.count = int(dist.get_rank(group)), int(dist.get_world_size(group))

    def member(self, rank: int) -> int:
        """The number that a member has among all processes."""
        return int(self.dist.get_global_rank(self.group, rank))

    def any(self, true: bool) -> bool:
        """Whether something is true in any process."""
        device = torch.accelerator.current_accelerator() if self.dist.get_backend(self.group) == "nccl" else None
        flag = torch.tensor(int(true), device=device)
        self.dist.all_reduce(flag, self.dist.ReduceOp.MAX, group=self.group)
        return bool(flag)

    def gathered(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """The parts of all processes, one after the other along a dimension."""
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.count)]
        self.dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim)

    def summed(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all processes."""
        x = x.contiguous()
        self.dist.all_reduce(x, group=self.group)
        return x


@lru_cache(maxsize=64)
def group_of(name: str) -> Group:
    """The group of processes of a name that `group_name` gave."""
    from torch.distributed import distributed_c10d  # noqa: PLC0415 - as above

    groups: Any = distributed_c10d
    return Group(groups._resolve_process_group(name))


def group_name(mesh: Any, dim: int) -> str:
    """The name of the processes along a dimension of a mesh, which is the same in all of them."""
    return str(mesh.get_group(dim).group_name)


class Messages:
    """Tensors on their way between the processes of a group. Between two processes they come in the order in which both
    name them; `tag` tells those apart that are on their way together."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._waiting: list[Any] = []
        self._works: list[Any] = []
        self.received: list[torch.Tensor] = []

    def send(self, x: torch.Tensor, to: int, tag: int) -> None:
        """`x` must be contiguous, and stay as it is until `wait` returns."""
        self._name("isend", x, to, tag)

    def receive(self, into: torch.Tensor, source: int, tag: int) -> torch.Tensor:
        self._name("irecv", into, source, tag)
        self.received.append(into)
        return into

    def _name(self, what: str, x: torch.Tensor, other: int, tag: int) -> None:
        g = self._group
        self._waiting.append(g.dist.P2POp(getattr(g.dist, what), x, g.member(other), g.group, tag))

    def start(self) -> Messages:
        """Let those that were named go, together: a device that waits for one of two must not keep the other."""
        if self._waiting:
            self._works += [(work, self._waiting) for work in self._group.dist.batch_isend_irecv(self._waiting)]
            self._waiting = []
        return self

    def wait(self) -> None:
        """Until all have arrived."""
        self.start()
        for work, _ in self._works:
            work.wait()
        self._works.clear()
