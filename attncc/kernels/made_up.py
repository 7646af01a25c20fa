"""Data made up for an attention, so that its kernel can be tried: small sizes, and tensors that its expressions can
read.

What is drawn depends on nothing but the attention and the attempt: not on torch's default dtype, device or generator.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch

from attncc.ir import Attention, Expr, Size, Tensor
from attncc.ir.analysis import at_sizes
from attncc.ir.evaluate import DTYPE_OF
from attncc.ir.expr import loads

#: Rows and keys where a call decides them: more than a tile of rows and a block of keys, and no multiple of a vector.
ROWS, KEYS, CHANNELS, BATCH, OTHER = 70, 139, 16, 2, 3
#: Where those do not fit each other: everything alike.
ALIKE = (96, 8)
#: Numbers that are drawn; larger tensors repeat them. A prime, so that no dimension does.
_DRAWN = 65521
#: Of a softmax's queries and keys some, this many numbers at a time, are so much larger: scores then climb from a block
#: of keys to the next.
_SAME, _LOUD = 512, 16.0
#: Elements of all tensors of a trial at most.
MOST_ELEMENTS = 1 << 25


@dataclass(frozen=True)
class MadeUp:
    """Tensors and sizes in the order of the attention's."""

    tensors: list[torch.Tensor]
    sizes: list[int]


def attempts(a: Attention, count: int) -> Iterator[MadeUp]:
    """Data for the first `count` tensors of `a`, the likeliest to say much first. What cannot be had is left out."""
    for sizes in _sizes(a):
        for plain in (False, True):
            try:
                table: dict[Size, int] = dict(zip(a.sizes, sizes, strict=True))
                shapes = [[at_sizes(n, table) for n in t.shape] for t in a.tensors[:count]]
            except ValueError:
                break
            if any(n < 0 for shape in shapes for n in shape) or sum(map(prod, shapes)) > MOST_ELEMENTS:
                break
            draw = _Draw(a, table, plain)
            yield MadeUp([draw(t, shape) for t, shape in zip(a.tensors, shapes, strict=False)], list(sizes))


def blank(t: Tensor, sizes: Sequence[int], a: Attention) -> torch.Tensor:
    """A tensor that `a` declares and does not read."""
    table = dict(zip(a.sizes, sizes, strict=True))
    return torch.zeros([at_sizes(n, table) for n in t.shape], dtype=DTYPE_OF[t.dtype])


def reads_through_data(a: Attention) -> bool:
    """Whether what one tensor holds says where another is read: not everything that is drawn then lies inside it."""
    every = loads(*a.expressions())
    indices = [x for access in (a.q, a.k, a.v) for x in access.index] + [x for load in every for x in load.index]
    return bool(loads(*indices))


def _sizes(a: Attention) -> list[list[int]]:
    if not a.sizes:
        return [[]]
    role: dict[Expr, int] = {axis.extent: BATCH for axis in a.batch}
    role |= {a.d.extent: CHANNELS, a.e.extent: CHANNELS, a.i.extent: ROWS, a.j.extent: KEYS}
    own = {axis.extent for axis in (*a.batch, a.d, a.e)}
    return [[role.get(s, OTHER) for s in a.sizes], *([role[s] if s in own else n for s in a.sizes] for n in ALIKE)]


class _Draw:
    """`plain`: floats above zero, integers zero, which every expression can read, in place of what says most."""

    def __init__(self, a: Attention, table: dict[Size, int], plain: bool) -> None:
        self.loud = {a.q.tensor: 4, a.k.tensor: 8} if a.normalizer == "softmax" else {}
        self.operands = {a.q.tensor, a.k.tensor, a.v.tensor}
        self.by_token = {a.i.extent, a.j.extent}
        self.keys = at_sizes(a.j.extent, table)
        self.plain = plain
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, t: Tensor, shape: Sequence[int]) -> torch.Tensor:
        count = prod(shape)
        some = min(count, _DRAWN)
        if t.kind == "float":
            pool = torch.randn(some, generator=self.generator, dtype=torch.float32, device="cpu")
            if t.name in self.loud:
                every = self.loud[t.name]
                pool[torch.arange(some, device="cpu") // _SAME % every == every - 1] *= _LOUD
            elif self.plain and t.name not in self.operands:
                pool = pool.abs() * 0.5 + 0.1
        elif t.kind == "bool":
            pool = torch.rand(some, generator=self.generator, dtype=torch.float32, device="cpu") < 0.75
        elif self.plain:
            pool = torch.zeros(some, dtype=torch.int64, device="cpu")
        elif self.by_token.isdisjoint(t.shape):  # lengths and the like
            pool = torch.randint(1, max(2, self.keys + 1), (some,), generator=self.generator, device="cpu")
        else:  # documents and the like
            pool = torch.randint(0, 4, (some,), generator=self.generator, device="cpu")
        value = pool.to(DTYPE_OF[t.dtype])
        if count > some:
            value = value.repeat(-(-count // some))[:count]
        value = value.view(list(shape))
        return value.sort(-1).values if t.kind == "int" and value.ndim and not self.plain else value
