"""Random calls of the operators that are products of two tensors summed over a shared axis."""

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
_DTYPES = (torch.float32, torch.float64)


def samples(target: OpOverload, count: int, seed: int = 0) -> list[Sample]:
    """Calls of an operator that torch accepts; none without a line in the table below."""
    make = CALLS.get(target)
    if make is None:
        return []

    def one(trial: int) -> Sample:
        random = Random(f"{target} {seed} {trial}")
        return make(target, Arguments(random, dtype=random.choice(_DTYPES)))

    return accepted(one, count)


def _sizes(a: Arguments, count: int) -> list[int]:
    return [a.random.choice((1, 2, 3, 4)) for _ in range(count)]


def _batches(a: Arguments) -> tuple[list[int], list[int]]:
    """Two shapes that broadcast to each other."""
    whole = _sizes(a, a.random.randrange(3))

    def side() -> list[int]:
        shape = [1 if a.random.random() < 0.25 else n for n in whole]
        return shape[a.random.randrange(len(shape) + 1) :] if a.random.random() < 0.3 else shape

    return side(), side()


def _matmul(target: OpOverload, a: Arguments) -> Sample:
    m, k, n = _sizes(a, 3)
    left, right = _batches(a)
    x, y = a.tensor((*left, m, k)), a.tensor((*right, k, n))
    kind = a.random.randrange(4)
    if kind == 0:
        x = a.tensor((k,))
    elif kind == 1:
        y = a.tensor((k,))
    return Sample(target, (x, y))


def _plain(*shapes: str) -> Call:
    """Tensors whose dimensions have names."""

    def call(target: OpOverload, a: Arguments) -> Sample:
        size = dict(zip("bmkn", _sizes(a, 4), strict=True))
        return Sample(target, tuple(a.tensor([size[c] for c in x]) for x in shapes))

    return call


def _added(*shapes: str) -> Call:
    """The same, added to something that broadcasts to the product, both scaled."""

    def call(target: OpOverload, a: Arguments) -> Sample:
        s = _plain(*shapes)(target, a)
        product = torch.matmul(*s.args)
        shape = [1 if a.random.random() < 0.3 else n for n in product.shape]
        scales = {name: a.random.choice((1, 1, 2, 0.5, 0)) for name in ("alpha", "beta")}
        return Sample(target, (a.tensor(shape), *s.args), {k: v for k, v in scales.items() if v != 1})

    return call


def _einsum(target: OpOverload, a: Arguments) -> Sample:
    """Letters on one side or both, some summed; ellipses, spaces and results left out at times."""
    r = a.random
    letters = r.sample("abcdef", r.randrange(2, 6))
    size = dict(zip(letters, _sizes(a, len(letters)), strict=True))
    summed = set(r.sample(letters, r.randrange(1, min(3, len(letters)))))
    where = {c: 2 if c in summed else r.randrange(3) for c in letters}
    left, right = ([c for c in letters if where[c] in (side, 2)] for side in (0, 1))
    out = [c for c in letters if c not in summed]
    for x in (left, right, out):
        r.shuffle(x)
    shapes = [[size[c] for c in x] for x in (left, right)]
    front = ""
    if r.random() < 0.3:
        front, batch = "...", _sizes(a, r.randrange(1, 3))
        shapes = [[*batch, *shape] for shape in shapes]
    equation = f"{front}{''.join(left)}, {front}{''.join(right)}"
    if r.random() < 0.8:
        equation += f" -> {front}{''.join(out)}"
    return Sample(target, (equation, [a.tensor(shape) for shape in shapes]))


def _written_out(target: OpOverload, a: Arguments) -> Sample:
    """A product written element by element and summed, or averaged, over one dimension."""
    b, i, j, d = (a.random.choice((2, 3, 4)) for _ in range(4))
    q, k = a.tensor((b, i, d)), a.tensor(a.random.choice(((b, j, d), (j, d))))
    scale, keep = a.random.choice((1.0, 0.5)), a.random.random() < 0.5

    def spread(q: Q, k: Q, dim: int, keep: bool) -> tuple[Any, ...]:
        return q.unsqueeze(-2) * scale * k.unsqueeze(-3), [dim], keep

    def transposed(q: Q, k: Q, dim: int, keep: bool) -> tuple[Any, ...]:
        return q.mT.unsqueeze(-1) * k.mT.unsqueeze(-2), [-3 if dim < 0 else 1], keep

    return Sample(target, (q, k, a.random.choice((-1, 3)), keep), prepare=a.random.choice((spread, transposed)))


def _inner(target: OpOverload, a: Arguments) -> Sample:
    k = a.random.choice((1, 2, 4))
    return Sample(target, tuple(a.tensor((*_sizes(a, a.random.randrange(3)), k)) for _ in range(2)))


def _cosine(target: OpOverload, a: Arguments) -> Sample:
    b, i, j, d = (a.random.choice((2, 3, 4)) for _ in range(4))
    dim = a.random.choice((-1, 3))
    x, y = a.tensor((b, i, 1, d)), a.tensor(a.random.choice(((b, 1, j, d), (1, j, d), (j, d))))
    return Sample(target, (x, y, dim, a.random.choice((1e-8, 0.5))))


def _vecdot(target: OpOverload, a: Arguments) -> Sample:
    b, i, j, d = (a.random.choice((2, 3, 4)) for _ in range(4))
    return Sample(target, (a.tensor((b, i, 1, d)), a.tensor(a.random.choice(((b, 1, j, d), (j, d))))))


def _tensordot(target: OpOverload, a: Arguments) -> Sample:
    r = a.random
    shapes = [_sizes(a, r.randrange(1, 4)) for _ in range(2)]
    count = r.randrange(1, min(map(len, shapes)) + 1)
    first, second = (r.sample(range(len(shape)), count) for shape in shapes)
    for x, y in zip(first, second, strict=True):
        shapes[1][y] = shapes[0][x]
    back = [d - len(shapes[0]) if r.random() < 0.3 else d for d in first]
    return Sample(target, (*(a.tensor(shape) for shape in shapes), back, second))


def _layer(target: OpOverload, a: Arguments) -> Sample:
    inner, outer = a.random.choice((1, 2, 4)), a.random.choice((2, 3))
    bias = a.tensor((outer,)) if a.random.random() < 0.5 else None
    taps = {aten.linear.default: 0, aten.conv1d.default: 1, aten.conv2d.default: 2}[target]
    if taps:
        return Sample(target, (a.tensor((2, inner, *_sizes(a, taps))), a.tensor((outer, inner, *[1] * taps)), bias))
    return Sample(target, (a.tensor((*_sizes(a, a.random.randrange(1, 4)), inner)), a.tensor((outer, inner)), bias))


CALLS: dict[OpOverload, Call] = {
    aten.matmul.default: _matmul,
    aten.mm.default: _plain("mk", "kn"),
    aten.bmm.default: _plain("bmk", "bkn"),
    aten.mv.default: _plain("mk", "k"),
    aten.baddbmm.default: _added("bmk", "bkn"),
    aten.addmm.default: _added("mk", "kn"),
    aten.einsum.default: _einsum,
    **dict.fromkeys((aten.sum.dim_IntList, aten.mean.dim), _written_out),
    aten.inner.default: _inner,
    aten.cosine_similarity.default: _cosine,
    aten.tensordot.default: _tensordot,
    aten.linalg_vecdot.default: _vecdot,
    **dict.fromkeys((aten.linear.default, aten.conv1d.default, aten.conv2d.default), _layer),
}
