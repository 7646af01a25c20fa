"""Attention on distributed tensors: each process works out the points of the batch that it holds.

    out[h in part p, ..] = attention of the parts p of q, k, v and of what else is read along h

Axes of the batch that are shardable (`attncc.ir.analysis.shardable_axes`) stay cut as q is. What is cut otherwise,
along rows or keys say, is gathered first. A tensor that all parts read gets a gradient that is the sum of theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from attncc.ir import Attention, Axis, Const, Size, print_attention
from attncc.ir.analysis import Shard, shardable_axes
from attncc.runtime.outputs import signature_of
from attncc.torch_private.distributed import answer_for, local_part, mesh_of, shard_dims, whole_of


@dataclass(frozen=True)
class Cut:
    """How a call is cut over a mesh: for each of its dimensions the axis that is, or None."""

    shards: tuple[Shard | None, ...]
    counts: tuple[int, ...]

    def dims(self, tensor: str) -> list[int | None]:
        """The dimension of a tensor that is cut along each dimension of the mesh."""
        return [None if s is None else s.tensors.get(tensor) for s in self.shards]

    def places(self, a: Attention) -> list[int | None]:
        """The same for the outputs, which all begin with the batch."""
        return [None if s is None else a.batch.index(s.axis) for s in self.shards]


def cut_of(a: Attention, sizes: Sequence[int], dims: Sequence[int | None], counts: Sequence[int]) -> Cut:
    """The cut that leaves q where it is, as far as the attention can be worked out in such parts: `dims` are the
    dimensions of q's tensor that are cut, `counts` the processes along each dimension of the mesh."""
    by_dim = {s.tensors.get(a.q.tensor): s for s in shardable_axes(a)}
    table = dict(zip(a.sizes, sizes, strict=True))
    left = {x: _number(x, table) for x in a.batch}
    chosen: list[Shard | None] = []
    for dim, count in zip(dims, counts, strict=True):
        shard = None if dim is None else by_dim.get(dim)
        if shard is not None and left[shard.axis] % (count * shard.multiple) == 0:
            left[shard.axis] //= count
            chosen.append(shard)
        else:
            chosen.append(None)
    return Cut(tuple(chosen), tuple(counts))


def _number(x: Axis, table: dict[Size, int]) -> int:
    return table[x.extent] if isinstance(x.extent, Size) else int(x.extent.value)


def local_call(a: Attention, sizes: Sequence[int], cut: Cut) -> tuple[Attention, list[int]]:
    """The attention of one part and the sizes that it is called with."""
    numbers = dict(zip(a.sizes, sizes, strict=True))
    for shard, count in zip(cut.shards, cut.counts, strict=True):
        if shard is None:
            continue
        axis = next(x for x in a.batch if x.name == shard.axis.name)
        if isinstance(axis.extent, Size):
            numbers[axis.extent] //= count
            continue
        part = replace(axis, extent=Const(int(axis.extent.value) // count))
        tensors = tuple(
            replace(t, shape=tuple(
                Const(int(n.value) // count) if d == shard.tensors.get(t.name) and isinstance(n, Const) else n
                for d, n in enumerate(t.shape)
            ))
            for t in a.tensors
        )  # fmt: skip
        a = replace(a, batch=tuple(part if x is axis else x for x in a.batch), tensors=tensors)
    return a, list(numbers.values())


@dataclass(frozen=True)
class _Call:
    """A call on distributed tensors, as this process makes it."""

    mesh: Any
    cut: Cut
    whole: Attention
    spec: str
    sizes: list[int]

    def part(self, x: Any, dims: Sequence[int | None]) -> torch.Tensor:
        return local_part(x, self.mesh, dims)


def _call(tensors: Sequence[Any], sizes: Sequence[int], spec: str) -> _Call:
    a, mesh = signature_of(spec).attention, mesh_of(tensors)
    q = tensors[next(at for at, t in enumerate(a.tensors) if t.name == a.q.tensor)]
    cut = cut_of(a, sizes, shard_dims(q, mesh), [mesh.size(d) for d in range(mesh.ndim)])
    own, numbers = local_call(a, sizes, cut)
    return _Call(mesh, cut, a, print_attention(own), numbers)


def _attention(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    tensors, sizes, spec = args
    call = _call(tensors, sizes, spec)
    parts = [call.part(x, call.cut.dims(t.name)) for x, t in zip(tensors, call.whole.tensors, strict=True)]
    return [whole_of(x, call.mesh, call.cut.places(call.whole)) for x in op(parts, call.sizes, call.spec)]


def _gradients(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    grads, tensors, outputs, kept, sizes, spec, wanted = args
    call = _call(tensors, sizes, spec)
    a, places = call.whole, call.cut.places(call.whole)
    parts = [call.part(x, call.cut.dims(t.name)) for x, t in zip(tensors, a.tensors, strict=True)]
    own = ([call.part(x, places) for x in xs] for xs in (grads, outputs))
    found = op(next(own), parts, next(own), kept, call.sizes, call.spec, wanted)
    names = [t.name for t, w in zip(a.tensors, wanted, strict=True) if w]
    return [whole_of(x, call.mesh, _of_gradient(call.cut, name)) for name, x in zip(names, found, strict=True)]


def _of_gradient(cut: Cut, tensor: str) -> list[int | str | None]:
    """A tensor that is read whole by all parts gets a part of its gradient from each."""
    dims = cut.dims(tensor)
    return ["sum" if s is not None and d is None else d for s, d in zip(cut.shards, dims, strict=True)]


@cache
def install() -> None:
    """Answer for distributed tensors; once, when the first is met."""
    ops: Any = torch.ops.attncc
    answer_for({ops.attention.default: _attention, ops.attention_gradients.default: _gradients})
