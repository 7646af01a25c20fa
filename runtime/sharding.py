"""Attention on distributed tensors: each process works out the points of the batch, and the rows, that it holds.

    out[h in part p, ..]   = attention of the parts p of q, k, v and of what else is read along h
    out[.., i in part p]   = attention of the rows of part p, at i + first(p), over all keys       (context parallelism)

Axes of the batch that are shardable (`attncc.ir.analysis.shardable_axes`) and rows stay cut as q is; for rows, keys and
values are gathered. What is cut otherwise is gathered first. A tensor that all parts read gets a gradient that is the
sum of theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from attncc.ir import Attention, Const, Expr, Size, Tensor, print_attention
from attncc.ir.analysis import Shard, shardable_axes
from attncc.ir.attention import fresh_name
from attncc.ir.build import add
from attncc.ir.expr import loads, mentions
from attncc.runtime.outputs import signature_of
from attncc.torch_private.distributed import answer_for, coordinate, local_part, mesh_of, shard_dims, whole_of


@dataclass(frozen=True)
class Rows:
    """The rows of an attention, cut along one dimension of q's tensor, which nothing else is read from."""

    tensor: str
    dim: int


@dataclass(frozen=True)
class Cut:
    """How a call is cut over a mesh: for each of its dimensions an axis of the batch, the rows, or nothing."""

    shards: tuple[Shard | Rows | None, ...]
    counts: tuple[int, ...]

    def dims(self, tensor: str) -> list[int | None]:
        """The dimension of a tensor that is cut along each dimension of the mesh."""

        def dim(s: Shard | Rows | None) -> int | None:
            if isinstance(s, Rows):
                return s.dim if s.tensor == tensor else None
            return None if s is None else s.tensors.get(tensor)

        return [dim(s) for s in self.shards]

    def places(self, a: Attention) -> list[int | None]:
        """The same for the outputs, which are laid out as (*batch, rows, ...)."""
        names = [x.name for x in a.batch]
        return [
            None if s is None else len(names) if isinstance(s, Rows) else names.index(s.axis.name) for s in self.shards
        ]


def cut_of(a: Attention, sizes: Sequence[int], dims: Sequence[int | None], counts: Sequence[int]) -> Cut:
    """The cut that leaves q where it is, as far as the attention can be worked out in such parts: `dims` are the
    dimensions of q's tensor that are cut, `counts` the processes along each dimension of the mesh."""
    by_dim: dict[int | None, Shard | Rows] = {s.tensors.get(a.q.tensor): s for s in shardable_axes(a)}
    rows = _rows(a)
    if rows is not None:
        by_dim[rows.dim] = rows
    table: dict[Expr, int] = dict(zip(a.sizes, sizes, strict=True))
    left = {x.name: _number(x.extent, table) for x in (*a.batch, a.i)}
    chosen: list[Shard | Rows | None] = []
    for dim, count in zip(dims, counts, strict=True):
        shard = None if dim is None else by_dim.get(dim)
        name = a.i.name if isinstance(shard, Rows) else "" if shard is None else shard.axis.name
        multiple = shard.multiple if isinstance(shard, Shard) else 1
        # rows that are cut twice would begin at two places
        again = isinstance(shard, Rows) and shard in chosen
        if shard is not None and not again and left[name] % (count * multiple) == 0:
            left[name] //= count
            chosen.append(shard)
        else:
            chosen.append(None)
    return Cut(tuple(chosen), tuple(counts))


def _rows(a: Attention) -> Rows | None:
    """The dimension of q's tensor that is its rows, where that tensor is read for nothing else."""
    (*found,) = (d for d, x in enumerate(a.q.index) if mentions(x, a.i.index))
    others = [x for x in (a.score, a.mask, a.weight, a.sink) if x is not None]
    read = {a.k.tensor, a.v.tensor, *(x.tensor for x in loads(*others))}
    alone = len(found) == 1 and a.q.index[found[0]] is a.i.index and a.q.tensor not in read
    return Rows(a.q.tensor, found[0]) if alone and a.tensor(a.q.tensor).shape[found[0]] is a.i.extent else None


def _number(x: Expr, table: dict[Expr, int]) -> int:
    return int(x.value) if isinstance(x, Const) else table[x]


def local_call(
    a: Attention, sizes: Sequence[int], cut: Cut, at: Sequence[int] = ()
) -> tuple[Attention, list[int]]:  # fmt: skip
    """The attention of one part and the sizes that it is called with. `at`: where in the mesh that part is, zero where
    it is not given."""
    numbers: dict[Expr, int] = dict(zip(a.sizes, sizes, strict=True))
    for shard, count, place in zip(cut.shards, cut.counts, at or [0] * len(cut.counts), strict=True):
        if isinstance(shard, Rows):
            a, numbers = _rows_of(a, numbers, shard, count, place)
        elif shard is not None:
            a, numbers = _points_of(a, numbers, shard, count)
    return a, [numbers[n] for n in a.sizes]


def _points_of(
    a: Attention, numbers: dict[Expr, int], shard: Shard, count: int
) -> tuple[Attention, dict[Expr, int]]:  # fmt: skip
    """One part of the batch."""
    axis = next(x for x in a.batch if x.name == shard.axis.name)
    if isinstance(axis.extent, Size):
        return a, numbers | {axis.extent: numbers[axis.extent] // count}
    part = replace(axis, extent=Const(int(axis.extent.value) // count))

    def cut(t: Tensor) -> Tensor:
        dim = shard.tensors.get(t.name)
        return replace(t, shape=tuple(
            Const(int(n.value) // count) if d == dim and isinstance(n, Const) else n for d, n in enumerate(t.shape)
        ))  # fmt: skip

    batch = tuple(part if x is axis else x for x in a.batch)
    return replace(a, batch=batch, tensors=tuple(map(cut, a.tensors))), numbers


def _rows_of(
    a: Attention, numbers: dict[Expr, int], rows: Rows, count: int, place: int
) -> tuple[Attention, dict[Expr, int]]:  # fmt: skip
    """One part of the rows: expressions see where it begins, a size of the call, so that all parts share a kernel."""
    taken = {x.name for x in (*a.axes, *a.sizes, *a.tensors)}
    first, length = (Size(fresh_name(word, taken)) for word in ("first", "rows"))
    part = _number(a.i.extent, numbers) // count
    read = a.tensor(rows.tensor)
    shape = tuple(length if d == rows.dim else n for d, n in enumerate(read.shape))
    moved = a.substitute({a.i.index: add(a.i.index, first)})
    own = replace(
        moved, q=a.q, i=replace(a.i, extent=length), sizes=(*a.sizes, first, length),
        tensors=tuple(replace(t, shape=shape) if t is read else t for t in a.tensors),
    )  # fmt: skip
    return own, numbers | {first: place * part, length: part}


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
    own, numbers = local_call(a, sizes, cut, coordinate(mesh))
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
