"""Random calls of the operators that only move values, and the same operators on sizes that are symbols."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import prod
from random import Random
from typing import Any

import torch
from torch._ops import OpOverload

from reading.arguments import Arguments, accepted
from reading.asked import Q, Sample

aten = torch.ops.aten


def samples(target: OpOverload, count: int, seed: int = 0) -> list[Sample]:
    """Calls of an operator that torch accepts; none without a line in the table below."""
    make = _CALLS.get(target)
    if make is None:
        return []

    def one(trial: int) -> Sample:
        a = Arguments(Random(f"{target} {seed} {trial}"), rank=0)
        return make(target, a)

    return accepted(one, count)


Call = Callable[[OpOverload, Arguments], Sample]


def _tensor(a: Arguments) -> Q:
    """A tensor of the common shape in which no two elements are equal, in some order of memory."""
    order = list(range(len(a.shape)))
    a.random.shuffle(order)
    shape = [a.shape[d] for d in order]
    x = torch.arange(prod(shape))[torch.randperm(prod(shape))].view(shape)
    back = [order.index(d) for d in range(len(order))]
    return x.permute(back).to(a.random.choice((torch.float32, torch.int64, torch.bfloat16)))


def _plain(*more: Callable[[Arguments], Any], **named: Callable[[Arguments], Any]) -> Call:
    """A tensor, and what is chosen beside it."""

    def call(target: OpOverload, a: Arguments) -> Sample:
        x = _tensor(a)
        return Sample(target, (x, *(f(a) for f in more)), {k: f(a) for k, f in named.items()})

    return call


def _dim(a: Arguments) -> int:
    return a.dim()


def _new_dim(a: Arguments) -> int:
    return a.dim(len(a.shape) + 1)


def _some_dims(a: Arguments) -> list[int]:
    rank = len(a.shape)
    chosen = a.random.sample(range(rank), a.random.randrange(rank + 1))
    return [d - rank if a.random.random() < 0.5 else d for d in chosen]


def _order(a: Arguments) -> list[int]:
    rank = len(a.shape)
    order = a.random.sample(range(rank), rank)
    return [d - rank if a.random.random() < 0.3 else d for d in order]


def _length(a: Arguments, dim: int) -> int:
    return a.shape[dim]


def _wider(a: Arguments) -> list[int]:
    """A shape that the tensor broadcasts to: more dimensions in front, and longer ones where it has one element."""
    front = [a.random.choice((1, 2, 3)) for _ in range(a.random.randrange(3))]
    return [*front, *(a.random.choice((1, 3)) if n == 1 else n for n in a.shape)]


def _reshaped(a: Arguments) -> list[int]:
    """Another shape of as many elements."""
    count, shape = prod(a.shape), list[int]()
    for _ in range(a.random.randrange(4)):
        divisors = [n for n in range(1, count + 1) if count % n == 0]
        shape.append(a.random.choice(divisors))
        count //= shape[-1]
    shape.insert(a.random.randrange(len(shape) + 1), count)
    return [-1 if d == 0 and a.random.random() < 0.3 else n for d, n in enumerate(shape)]


def _like(shape: Callable[[Arguments], list[int]]) -> Callable[[Arguments], Q]:
    return lambda a: torch.zeros([n if n >= 0 else 1 for n in shape(a)])


def _dense(call: Call) -> Call:
    """The same on a tensor whose elements lie in order."""

    def made(target: OpOverload, a: Arguments) -> Sample:
        s = call(target, a)
        return Sample(target, (s.args[0].contiguous(), *s.args[1:]), s.kwargs)

    return made


def _along(call: Callable[[Arguments, int], tuple[Any, ...]]) -> Call:
    """A tensor, a dimension of it, and what is chosen for that dimension."""

    def made(target: OpOverload, a: Arguments) -> Sample:
        a.shape = a.shape or [3]
        x, dim = _tensor(a), a.dim()
        return Sample(target, (x, dim, *call(a, dim)))

    return made


def _part_of(a: Arguments, dim: int) -> tuple[Any, ...]:
    """Bounds and step of a slice, beyond the ends and from the end too, left out at times."""
    n, r = _length(a, dim), a.random
    start, end = (r.choice((None, r.randrange(-n - 1, n + 2))) for _ in range(2))
    return start, end, r.choice((1, 1, 2, 3))


def _narrow(a: Arguments, dim: int) -> tuple[Any, ...]:
    n = _length(a, dim)
    start = a.random.randrange(-n, n)
    return start, a.random.randrange(1, n - start % n + 1)


def _permuted_pairs(target: OpOverload, a: Arguments) -> Sample:
    """`movedim` of several dimensions."""
    count = a.random.randrange(len(a.shape) + 1)
    return Sample(target, (_tensor(a), _order(a)[:count], _order(a)[:count]))


def _windows(target: OpOverload, a: Arguments) -> Sample:
    """Overlapping or plain views by strides, within the tensor."""
    x = _tensor(a)
    r, count = a.random, x.numel()
    step, width = r.choice((1, 2, 3)), r.choice((1, 2, 3))
    rows = max((count - width) // step + 1, 1)
    return Sample(target, (x.contiguous() if r.random() < 0.5 else x, [rows, width], [step, 1]))


def _rolled(target: OpOverload, a: Arguments) -> Sample:
    dims = _some_dims(a)
    return Sample(target, (_tensor(a), [a.random.randrange(-5, 6) for _ in dims], dims))


def _repeats(a: Arguments) -> list[int]:
    return [a.random.choice((1, 2, 3)) for _ in range(len(a.shape) + a.random.randrange(2))]


def _flat(target: OpOverload, a: Arguments) -> Sample:
    rank = len(a.shape)
    first, last = sorted((a.random.randrange(max(rank, 1)), a.random.randrange(max(rank, 1))))
    return Sample(target, (_tensor(a), first, last - rank if rank and a.random.random() < 0.5 else last))


def _unflat(target: OpOverload, a: Arguments) -> Sample:
    x, dim = _tensor(a), a.dim()
    n = x.shape[dim] if x.ndim else 1
    by = a.random.choice([k for k in range(1, n + 1) if n % k == 0])
    return Sample(target, (x, dim, a.random.choice(([by, n // by], [-1, by], [n, 1]))))


def _parts(choose: Callable[[Arguments, int], tuple[Any, ...]]) -> Call:
    """One of the parts that a tensor is split into along a dimension."""

    def made(target: OpOverload, a: Arguments) -> Sample:
        a.shape = a.shape or [3]
        x, dim = _tensor(a), a.dim()
        n = x.shape[dim]
        args = (x, *choose(a, n), dim)
        count = len(target(*args))
        return Sample(target, args, which=a.random.randrange(-count, count))

    return made


def _lengths(a: Arguments, n: int) -> tuple[Any, ...]:
    cuts = sorted(a.random.randrange(n + 1) for _ in range(2))
    return ([end - start for start, end in pairwise((0, *cuts, n))],)


def _size(a: Arguments, n: int) -> tuple[Any, ...]:
    return (a.random.randrange(1, n + 2),)


def _grid(target: OpOverload, a: Arguments) -> Sample:
    lengths = [a.random.choice((1, 2, 3)) for _ in range(a.random.randrange(1, 4))]
    sources = [a.tensor((n,) if a.random.random() < 0.9 else (), torch.float32) for n in lengths]
    named = {"indexing": a.random.choice(("ij", "xy"))} if target is aten.meshgrid.indexing else {}
    return Sample(target, (sources,), named, which=a.random.randrange(len(sources)))


_CALLS: dict[OpOverload, Call] = {
    **dict.fromkeys(
        (aten.contiguous.default, aten.clone.default, aten.detach.default, aten.alias.default, aten.lift_fresh.default,
         aten.lift_fresh_copy.default, aten.detach_.default, aten.t.default, aten.mT.default, aten.adjoint.default,
         aten.numpy_T.default, aten.squeeze.default), _plain()),
    **dict.fromkeys((aten.transpose.int, aten.swapaxes.default, aten.swapdims.default), _plain(_dim, _dim)),
    aten.permute.default: _plain(_order),
    **dict.fromkeys((aten.movedim.int, aten.moveaxis.int), _plain(_dim, _dim)),
    aten.movedim.intlist: _permuted_pairs,
    **dict.fromkeys((aten.expand.default, aten.broadcast_to.default), _plain(_wider)),
    aten.expand_as.default: _plain(_like(_wider)),
    aten.unsqueeze.default: _plain(_new_dim),
    aten.squeeze.dim: _plain(_dim),
    aten.squeeze.dims: _plain(_some_dims),
    **dict.fromkeys((aten.view.default, aten._unsafe_view.default), _dense(_plain(_reshaped))),
    aten.reshape.default: _plain(_reshaped),
    aten.view_as.default: _dense(_plain(_like(_reshaped))),
    aten.reshape_as.default: _plain(_like(_reshaped)),
    aten.flatten.using_ints: _flat,
    aten.unflatten.int: _unflat,
    aten.slice.Tensor: _along(_part_of),
    aten.narrow.default: _along(_narrow),
    aten.select.int: _along(lambda a, dim: (a.random.randrange(-_length(a, dim), _length(a, dim)),)),
    aten.as_strided.default: _windows,
    aten.roll.default: _rolled,
    aten.flip.default: _plain(_some_dims),
    **dict.fromkeys((aten.repeat.default, aten.tile.default), _plain(_repeats)),
    aten.repeat_interleave.self_int: _plain(lambda a: a.random.choice((1, 2, 3)), _dim),
    **dict.fromkeys((aten.split.Tensor, aten.chunk.default), _parts(_size)),
    **dict.fromkeys((aten.split_with_sizes.default, aten.split.sizes), _parts(_lengths)),
    aten.unbind.int: _parts(lambda a, n: ()),
    **dict.fromkeys((aten.meshgrid.default, aten.meshgrid.indexing), _grid),
}  # fmt: skip

#: The operators on a tensor of three dimensions whose sizes are symbols, the second twice the first, the third another.
SYMBOLIC: dict[OpOverload, Callable[[Q], Any]] = {
    aten.contiguous.default: lambda x: aten.contiguous(x.transpose(0, 2)),
    aten.clone.default: lambda x: aten.clone(x),
    aten.detach.default: lambda x: aten.detach(x),
    aten.alias.default: lambda x: aten.alias(x),
    aten.lift_fresh_copy.default: lambda x: aten.lift_fresh_copy(x),
    aten.detach_.default: lambda x: aten.detach_(x.clone()),
    aten.transpose.int: lambda x: aten.transpose(x, 0, -1),
    aten.swapaxes.default: lambda x: aten.swapaxes(x, 0, -1),
    aten.swapdims.default: lambda x: aten.swapdims(x, 1, -1),
    aten.permute.default: lambda x: aten.permute(x, [-1, 0, 1]),
    aten.t.default: lambda x: aten.t(x[0]),
    aten.mT.default: lambda x: aten.mT(x),
    aten.adjoint.default: lambda x: aten.adjoint(x),
    aten.numpy_T.default: lambda x: aten.numpy_T(x),
    aten.movedim.int: lambda x: aten.movedim.int(x, 0, -1),
    aten.movedim.intlist: lambda x: aten.movedim.intlist(x, [0, 1], [-1, 0]),
    aten.moveaxis.int: lambda x: aten.moveaxis.int(x, -1, 1),
    aten.expand.default: lambda x: aten.expand(x[:, :1], [3, -1, x.shape[1], -1]),
    aten.expand_as.default: lambda x: aten.expand_as(x[:1], x),
    aten.broadcast_to.default: lambda x: aten.broadcast_to(x[:, :, :1], [2, *x.shape]),
    aten.unsqueeze.default: lambda x: aten.unsqueeze(x, -2),
    aten.squeeze.default: lambda x: aten.squeeze(x[:, :1]),
    aten.squeeze.dim: lambda x: aten.squeeze(x[:, :1], 1),
    aten.squeeze.dims: lambda x: aten.squeeze(x[:1, :, :1], [0, -1, 1]),
    aten.view.default: lambda x: aten.view(x, [x.shape[0], 2, x.shape[0], -1]),
    aten.reshape.default: lambda x: aten.reshape(x.transpose(0, 1), [-1, x.shape[2]]),
    aten._unsafe_view.default: lambda x: aten._unsafe_view(x, [x.shape[0] * x.shape[1], x.shape[2]]),
    aten.view_as.default: lambda x: aten.view_as(x, x.new_zeros(x.shape[0], x.shape[1] * x.shape[2])),
    aten.reshape_as.default: lambda x: aten.reshape_as(x.mT, x.new_zeros(x.shape[0] * x.shape[2], x.shape[1])),
    aten.flatten.using_ints: lambda x: aten.flatten(x, 1, -1),
    aten.unflatten.int: lambda x: aten.unflatten(x, 1, [-1, 2]),
    aten.slice.Tensor: lambda x: aten.slice(x, 1, 1, x.shape[1] - 1),
    aten.narrow.default: lambda x: aten.narrow(x, 1, x.shape[0], x.shape[0]),
    aten.select.int: lambda x: aten.select(x, 1, -1),
    aten.as_strided.default: lambda x: aten.as_strided(x, x.shape, x.stride()),
    aten.roll.default: lambda x: aten.roll(x, [1, -2], [0, -1]),
    aten.flip.default: lambda x: aten.flip(x, [0, -1]),
    aten.repeat.default: lambda x: aten.repeat(x, [2, 1, 2, 1]),
    aten.tile.default: lambda x: aten.tile(x, [2, 1]),
    aten.repeat_interleave.self_int: lambda x: aten.repeat_interleave(x, 2, 1),
    aten.split.Tensor: lambda x: aten.split(x, x.shape[0], 1)[1],
    aten.split.sizes: lambda x: aten.split.sizes(x, [1, x.shape[1] - 1], 1)[1],
    aten.split_with_sizes.default: lambda x: aten.split_with_sizes(x, [x.shape[0], x.shape[0]], 1)[1],
    aten.chunk.default: lambda x: aten.chunk(x, 2, 1)[1],
    aten.unbind.int: lambda x: aten.unbind(x.new_zeros(2, x.shape[1]) + x[:2, :, 0], 0)[1],
    aten.meshgrid.default: lambda x: aten.meshgrid([x[0, 0], x[0, :, 0]])[1],
    aten.meshgrid.indexing: lambda x: aten.meshgrid([x[0, 0], x[0, :, 0]], indexing="xy")[1],
}
