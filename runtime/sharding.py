"""Attention on distributed tensors: each process works out the points of the batch, and the rows, that it holds.

    out[h in part p, ..]   = attention of the parts p of q, k, v and of what else is read along h
    out[.., i in part p]   = attention of the rows of part p, at i + first(p), over all keys       (context parallelism)

Axes of the batch that are shardable (`attncc.ir.analysis.shardable_axes`) and rows stay cut as q is. For rows, keys and
values are gathered, or where they are cut along their keys over the same processes, taken in turns (`ring`). What is
cut otherwise is gathered first. A tensor that all parts read gets a gradient that is the sum of theirs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from math import prod
from typing import Any

import torch

from attncc.ir import Attention, Const, Expr, Size, Tensor, print_attention
from attncc.ir.analysis import Shard, at_sizes, shardable_axes
from attncc.ir.attention import DTYPES
from attncc.ir.build import TRUE
from attncc.runtime import ring
from attncc.runtime.outputs import signature_of
from attncc.runtime.ring_plan import Places, alone, branch_of, places_of
from attncc.torch_private.distributed import (
    answer_for,
    coordinate,
    group_name,
    local_part,
    mesh_of,
    shard_dims,
    whole_of,
)

#: `gather` or `ring` instead of what `in_turns` chooses (`auto`). All processes must be told the same.
CONTEXT = "ATTNCC_CONTEXT"
#: Bytes of keys and values that each process may hold whole.
MOST_GATHERED = 1 << 28
#: Pairs of a row and a key from which on a mask that hides keys is worth messages of their own.
LEAST_PAIRS = 1 << 22


@dataclass(frozen=True)
class Rows:
    """The rows of an attention, cut along one dimension of q's tensor, which nothing else is read from; and the keys,
    cut likewise, where they are taken in turns."""

    tensor: str
    dim: int
    keys: Mapping[str, int] = field(default_factory=dict[str, int])

    @property
    def cut(self) -> Mapping[str, int]:
        return {self.tensor: self.dim, **self.keys}


@dataclass(frozen=True)
class Cut:
    """How a call is cut over a mesh: for each of its dimensions an axis of the batch, the rows, or nothing."""

    shards: tuple[Shard | Rows | None, ...]
    counts: tuple[int, ...]

    def dims(self, tensor: str) -> list[int | None]:
        """The dimension of a tensor that is cut along each dimension of the mesh."""

        def dim(s: Shard | Rows | None) -> int | None:
            return None if s is None else (s.cut if isinstance(s, Rows) else s.tensors).get(tensor)

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
    dim = None if a.q.tensor in (a.k.tensor, a.v.tensor) else alone(a, a.q.tensor, "i")
    return None if dim is None else Rows(a.q.tensor, dim)


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
    part = _number(a.i.extent, numbers) // count
    own = branch_of(a, Places(rows.tensor, rows.dim, {}), keys=False)
    first, length = own.sizes[-2:]
    return own, numbers | {first: place * part, length: part}


@dataclass(frozen=True)
class _Call:
    """A call on distributed tensors, as this process makes it. `group`: whom keys are taken in turns with, if anybody.
    """

    mesh: Any
    cut: Cut
    whole: Attention
    spec: str
    sizes: list[int]
    group: str = ""

    def part(self, x: Any, dims: Sequence[int | None]) -> torch.Tensor:
        return local_part(x, self.mesh, dims)

    def parts(self, tensors: Sequence[Any]) -> list[torch.Tensor]:
        return [self.part(x, self.cut.dims(t.name)) for x, t in zip(tensors, self.whole.tensors, strict=True)]


def _call(tensors: Sequence[Any], sizes: Sequence[int], spec: str, *, turns: bool = True) -> _Call:
    """`turns`: whether keys may be taken in turns."""
    a, mesh = signature_of(spec).attention, mesh_of(tensors)
    named = {t.name: x for t, x in zip(a.tensors, tensors, strict=True)}
    counts = [mesh.size(d) for d in range(mesh.ndim)]
    cut = cut_of(a, sizes, shard_dims(named[a.q.tensor], mesh), counts)
    at = next((d for d, s in enumerate(cut.shards) if isinstance(s, Rows)), None)
    if at is not None and turns and counts[at] > 1:
        batch = replace(cut, shards=tuple(None if d == at else s for d, s in enumerate(cut.shards)))
        own, numbers = local_call(a, sizes, batch, coordinate(mesh))
        found = places_of(own)
        lying = {name: shard_dims(x, mesh)[at] for name, x in named.items()}
        if found is not None and all(lying[name] == dim for name, dim in found.keys.items()):
            rows = Rows(found.q, found.row, found.keys)
            if in_turns(own, numbers, counts[at]):
                whole = replace(cut, shards=tuple(rows if d == at else s for d, s in enumerate(cut.shards)))
                return _Call(mesh, whole, a, print_attention(own), numbers, group_name(mesh, at))
    own, numbers = local_call(a, sizes, cut, coordinate(mesh))
    return _Call(mesh, cut, a, print_attention(own), numbers)


def in_turns(a: Attention, sizes: Sequence[int], count: int) -> bool:
    """Whether keys are taken in turns and not gathered, where both can be done: all processes decide alike, by what
    they all know. Gathering is one message and one kernel, so it is right for what is small; a mask that hides keys
    leaves messages out and evens out the work, and keys and values that are large must not be held whole."""
    table = dict(zip(a.sizes, sizes, strict=True))
    rows, keys = (at_sizes(x.extent, table) for x in (a.i, a.j))
    wanted = os.environ.get(CONTEXT, "auto")
    if wanted not in ("auto", "ring", "gather"):
        raise ValueError(f"{CONTEXT} is auto, ring or gather, not {wanted!r}")
    if keys % count or wanted == "gather":
        return False
    if wanted == "ring":
        return True
    held = sum(
        DTYPES[t.dtype][1] * prod(at_sizes(n, table) for n in t.shape)
        for t in (a.tensor(name) for name in {a.k.tensor, a.v.tensor})
    )
    return held > MOST_GATHERED or (a.mask is not TRUE and rows * keys >= LEAST_PAIRS)


def _attention(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    tensors, sizes, spec = args
    call = _call(tensors, sizes, spec)
    own = (call.parts(tensors), call.sizes, call.spec)
    found = ring.ring(*own, call.group) if call.group else op(*own)
    return [whole_of(x, call.mesh, call.cut.places(call.whole)) for x in found]


def _gradients(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    grads, tensors, outputs, kept, sizes, spec, wanted = args
    a = signature_of(spec).attention
    begun = a.normalizer != "softmax" or {"out", "lse"} <= set(kept.split(","))
    call = _call(tensors, sizes, spec, turns=begun)
    places = call.cut.places(a)
    seeds, saved = ([call.part(x, places) for x in xs] for xs in (grads, outputs))
    own = (seeds, call.parts(tensors), saved, kept, call.sizes, call.spec, wanted)
    found = ring.ring_gradients(*own, call.group) if call.group else op(*own)
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
