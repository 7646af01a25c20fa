"""Random calls of the operators that create values, pick them by other values, or join tensors."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch._ops import OpOverload

from reading.arguments import Arguments, accepted
from reading.asked import Q, Sample

aten = torch.ops.aten
Call = Callable[[OpOverload, Arguments], Sample]


def samples(target: OpOverload, count: int, seed: int = 0) -> list[Sample]:
    """Calls of an operator that torch accepts; none without a line in the table below."""
    make = CALLS.get(target)
    if make is None:
        return []
    return accepted(lambda trial: make(target, Arguments(Random(f"{target} {seed} {trial}"))), count)


def _dtype(a: Arguments) -> dict[str, Any]:
    dtype = a.random.choice((None, torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.bool))
    return {} if dtype is None else {"dtype": dtype}


def _range(target: OpOverload, a: Arguments) -> Sample:
    r = a.random
    given = _dtype(a)
    whole = not given.get("dtype", torch.float32).is_floating_point  # half a step is none
    start, step = r.choice((0, 2, -3, 1.5)), r.choice((1, 2, 3, -1, -2 if whole else 0.5))
    end = start + r.choice((1, 3, 4, 6)) * (step if target is aten.arange.start_step else 1)
    args = {aten.arange.default: (r.choice((1, 4, 6.0)),), aten.arange.start: (start, end)}
    return Sample(target, args.get(target, (start, end, step)), given)


def _filled(like: Callable[[Arguments], tuple[Any, ...]], *, fill: bool = False) -> Call:
    """A tensor of one value: of a shape, or of that of another tensor."""

    def call(target: OpOverload, a: Arguments) -> Sample:
        return Sample(target, (*like(a), *((a.number(),) if fill else ())), _dtype(a))

    return call


def _joined(target: OpOverload, a: Arguments) -> Sample:
    """Tensors of one shape but for the dimension that they are joined along."""
    dim = a.dim()
    parts: list[Q] = []
    for _ in range(a.random.randrange(1, 4)):
        shape = list(a.shape)
        if target is not aten.stack.default:
            shape[dim] = a.random.choice((0, 1, 2, 3))
        parts.append(a.tensor(shape))
    return Sample(target, (parts, a.dim(len(a.shape) + 1) if target is aten.stack.default else dim))


def _padded(target: OpOverload, a: Arguments) -> Sample:
    pads = [a.random.choice((-1, 0, 0, 1, 2)) for _ in range(2 * a.random.randrange(len(a.shape) + 1))]
    value = (a.random.choice((0, 0, 1.5, -2)),)
    if target is aten.pad.default:
        value = ("constant", a.random.choice((None, *value)))
    return Sample(target, (a.tensor(a.shape), pads, *value))


def _picked(target: OpOverload, a: Arguments) -> Sample:
    """Indices of up to three dimensions for some of a tensor's, from the end too; truth values at times."""
    shape = a.fitting()
    given: list[Q | None] = []
    for n in a.shape:
        low, r = a.random.choice((0, -n)), a.random.random()
        given.append(None if r < 0.4 else a.whole(low, n, shape if r < 0.9 else (1,)))
    while given and given[-1] is None:
        given.pop()
    return Sample(target, (a.tensor(a.shape), given))


def _put(target: OpOverload, a: Arguments) -> Sample:
    first = a.random.randrange(len(a.shape))
    last = a.random.randrange(first, len(a.shape)) + 1
    mask = a.tensor(a.shape[first:last], torch.bool)
    dtype = a.dtype
    value = a.tensor(a.random.choice(((), (1,), (1, 1))), dtype)
    return Sample(target, (a.tensor(a.shape, dtype), [*[None] * first, mask], value))


def _gathered(target: OpOverload, a: Arguments) -> Sample:
    dim, shape = a.dim(), list(a.shape)
    shape[dim] = a.random.choice((1, 2, 5))
    index = [a.random.randrange(1, n + 1) if target is aten.gather.default else a.random.choice((1, n)) for n in shape]
    x = a.tensor(a.shape)
    index[dim] = shape[dim]
    which: tuple[Any, ...] = (dim, a.whole(0, a.shape[dim], index))
    if target is aten.take_along_dim.default:
        which = (a.whole(0, a.shape[dim], index), dim)
        if a.random.random() < 0.2:
            which = (a.whole(0, x.numel(), (4,)),)
    return Sample(target, (x, *which))


def _selected(target: OpOverload, a: Arguments) -> Sample:
    dim = a.dim()
    shape = a.random.choice(((), (1,), (4,)))
    return Sample(target, (a.tensor(a.shape), dim, a.whole(0, a.shape[dim], shape, a.random.choice(_INDEX))))


def _embedded(target: OpOverload, a: Arguments) -> Sample:
    rows, width = a.random.choice((1, 3, 6)), a.random.choice((1, 4))
    ids = a.whole(0, rows, a.fitting(), a.random.choice(_INDEX))
    return Sample(target, (a.tensor((rows, width), torch.float32), ids))


_INDEX = (torch.int64, torch.int32)


def _outer(target: OpOverload, a: Arguments) -> Sample:
    """An einsum of two tensors that sums over nothing."""
    size = {c: a.random.choice((1, 2, 3)) for c in "bhij"}
    equation = a.random.choice(("i,j->ij", "bi,j->bij", "i,hj->jhi", "bhi,bj->bhij"))
    left, right = equation.split("->")[0].split(",")
    factors = [a.tensor([size[c] for c in x], torch.float32) for x in (left, right)]
    return Sample(target, (equation, factors))


def _distance(target: OpOverload, a: Arguments) -> Sample:
    """Squared differences of queries and keys, summed (or averaged) over their components."""
    b, i, j, d = (a.random.choice((2, 3, 4)) for _ in range(4))
    dtype = a.random.choice((torch.float32, torch.float64))
    q, k = a.tensor((b, i, d), dtype), a.tensor(a.random.choice(((b, j, d), (j, d))), dtype)
    squared = a.random.choice(
        (lambda x: x.pow(2), lambda x: x * x, lambda x: x.square(), lambda x: x.abs() ** 2)
    )
    keep = a.random.random() < 0.5
    return Sample(
        target, (q, k, a.random.choice((-1, 3)), keep),
        prepare=lambda q, k, dim, keep: (squared(q.unsqueeze(-2) - k.unsqueeze(-3)), [dim], keep),
    )  # fmt: skip


def _points(target: OpOverload, a: Arguments) -> Sample:
    """Distances of points; by a product where there are many, or where that is asked for."""
    b, d = a.random.choice((1, 2)), a.random.choice((2, 3))
    many = a.random.random() < 0.5
    i, j = (26 if many else a.random.choice((2, 3)) for _ in range(2))
    mode = a.random.choice((None, 0, 1)) if many else 1
    # apart from each other: by a product, what torch gives for points that meet is the rounding of their squares
    apart = a.tensor((b, j, d), torch.float32) + 8.0
    return Sample(target, (a.tensor((b, i, d), torch.float32), apart, 2.0, mode))


CALLS: dict[OpOverload, Call] = {
    **dict.fromkeys((aten.arange.default, aten.arange.start, aten.arange.start_step), _range),
    **dict.fromkeys((aten.zeros.default, aten.ones.default), _filled(lambda a: (a.shape,))),
    **dict.fromkeys((aten.zeros_like.default, aten.ones_like.default), _filled(lambda a: (a.tensor(),))),
    **dict.fromkeys((aten.new_zeros.default, aten.new_ones.default), _filled(lambda a: (a.tensor(), a.shape))),
    aten.full.default: _filled(lambda a: (a.shape,), fill=True),
    aten.full_like.default: _filled(lambda a: (a.tensor(),), fill=True),
    aten.new_full.default: _filled(lambda a: (a.tensor(), a.shape), fill=True),
    aten.scalar_tensor.default: lambda target, a: Sample(target, (a.number(),), _dtype(a)),
    **dict.fromkeys((aten.cat.default, aten.concat.default, aten.concatenate.default, aten.stack.default), _joined),
    **dict.fromkeys((aten.pad.default, aten.constant_pad_nd.default), _padded),
    aten.index.Tensor: _picked,
    **dict.fromkeys((aten.index_put.default, aten.index_put_.default), _put),
    **dict.fromkeys((aten.gather.default, aten.take_along_dim.default), _gathered),
    aten.index_select.default: _selected,
    aten.embedding.default: _embedded,
    aten.einsum.default: _outer,
    **dict.fromkeys((aten.sum.dim_IntList, aten.mean.dim), _distance),
    aten.cdist.default: _points,
}

#: The operators on a tensor of two dimensions whose sizes are symbols, the second twice the first, and on a tensor of
#: indices from 0 to 2 of the same shape.
SYMBOLIC: dict[OpOverload, Callable[[Q, Q], Q]] = {
    aten.arange.default: lambda x, i: aten.arange(x.shape[1]),
    aten.arange.start: lambda x, i: aten.arange(x.shape[0], x.shape[1]),
    aten.arange.start_step: lambda x, i: aten.arange(x.shape[0], x.shape[1] * 2, 3),
    aten.zeros.default: lambda x, i: aten.zeros([x.shape[0], 2]),
    aten.ones.default: lambda x, i: aten.ones([x.shape[0], 2]),
    aten.zeros_like.default: lambda x, i: aten.zeros_like(x),
    aten.ones_like.default: lambda x, i: aten.ones_like(x),
    aten.new_zeros.default: lambda x, i: aten.new_zeros(x, [x.shape[1]]),
    aten.new_ones.default: lambda x, i: aten.new_ones(x, [x.shape[1]]),
    aten.full.default: lambda x, i: aten.full([x.shape[0]], x.shape[1]),
    aten.full_like.default: lambda x, i: aten.full_like(x, x.shape[1] - 1),
    aten.new_full.default: lambda x, i: aten.new_full(x, [2, x.shape[0]], x.shape[1]),
    aten.scalar_tensor.default: lambda x, i: aten.scalar_tensor(x.shape[1]),
    aten.cat.default: lambda x, i: aten.cat([x, x * 2, x[:, :1]], 1),
    aten.concat.default: lambda x, i: aten.concat([x, x * 2, x[:, :1]], -1),
    aten.concatenate.default: lambda x, i: aten.concatenate([x, x * 2], 0),
    aten.stack.default: lambda x, i: aten.stack([x, x * 2, x * 3], 1),
    aten.pad.default: lambda x, i: aten.pad(x, [1, x.shape[0], -1, 2]),
    aten.constant_pad_nd.default: lambda x, i: aten.constant_pad_nd(x, [1, -2, 0, x.shape[1]], 7.0),
    aten.index.Tensor: lambda x, i: aten.index(x, [i, i.mT[:2].mT.contiguous()[:, :1]]),
    aten.index_put.default: lambda x, i: aten.index_put(x, [i > 1], torch.tensor(7.0)),
    aten.index_put_.default: lambda x, i: aten.index_put_(x.clone(), [None, i[0] > 1], torch.tensor(7.0)),
    aten.gather.default: lambda x, i: aten.gather(x, 1, i),
    aten.take_along_dim.default: lambda x, i: aten.take_along_dim(x[:, None], i[None], -1),
    aten.index_select.default: lambda x, i: aten.index_select(x, -1, i[0]),
    aten.embedding.default: lambda x, i: aten.embedding(x, i),
    aten.einsum.default: lambda x, i: aten.einsum("ab,c->acb", [x, x[0]]),
    aten.sum.dim_IntList: lambda x, i: aten.sum((x[:, None] - x.flip([0])[None]).pow(2), [-1]),
    aten.mean.dim: lambda x, i: aten.mean((x.mT[:, None, :2] - x.mT[None, :, :2]).pow(2), [-1]),
    aten.cdist.default: lambda x, i: aten.cdist(x, x.flip([0]) + 1.0, 2.0, 1),
}
