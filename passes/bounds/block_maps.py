"""Masks that nothing but looking can bound: a map of each literal, made once per call, or once ever where constant.

A literal such as `blocks[h, i // 64, j // 64]` or `visible[b, i, j]` says nothing in closed form. Its map holds for
every group of rows one bit for each block of keys: whether any row of the group sees a key of the block, and whether
all rows see all its keys. Where the literal depends on rows and keys through `i // c` and `j // c` alone it is looked
at once per block, which is all there is to see; else once per pair, in slices, so that nothing of the size of the score
matrix is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise
from math import prod

import numpy
import torch

from attncc.ir import Attention, Axis, Expr, Load, Op, Size, Tensor
from attncc.ir.affine import Poly, poly
from attncc.ir.analysis import blocks_of, runs_of
from attncc.ir.bounds import TILE_LO, Bits
from attncc.ir.build import ONE, ZERO, add, const, floordiv
from attncc.ir.evaluate import DTYPE_OF, Evaluator
from attncc.ir.interpret import extent, size_table
from attncc.ir.terms import free, loads, mentions, walk

#: Keys of a block where the literal has no blocks of its own.
BLOCK = 16
#: Operations on each pair that looking at it may take: a cast, a comparison, and one more.
MOST_COMPUTED = 3
_SLICE = 1 << 20  # pairs looked at at a time, few enough to stay in a cache


@dataclass(frozen=True)
class BlockMap:
    """i64[*batch axes the literal mentions, groups of `group` rows, 2, words]: a bit for each `block` keys, of what
    some row sees, then of what all rows see. A literal that does not mention the row has one group. With `else_all` a
    row that sees nothing sees everything."""

    tensor: Tensor
    index: tuple[Expr, ...]
    literal: Expr
    group: int
    block: int
    else_all: bool = False

    @property
    def sources(self) -> tuple[Expr, ...]:
        """What the map is made from."""
        return (self.literal,)

    @property
    def some(self) -> Bits:
        """Keys outside are hidden from every row of the tile."""
        return Bits(self.tensor.name, (*self.index, ZERO), self.block, self.group)

    @property
    def every(self) -> Bits:
        """Keys inside are seen by every row of the tile."""
        return Bits(self.tensor.name, (*self.index, ONE), self.block, self.group)


def block_map(literal: Expr, a: Attention, name: str, group: int) -> BlockMap:
    """The map for tiles of up to `group` rows that do not cross a multiple of it."""
    axes = [x for x in a.batch if x.index in free(literal)]
    index: tuple[Expr, ...] = tuple(x.index for x in axes)
    by_key = blocks_of(literal, a.j.index)
    block = BLOCK if by_key is None or by_key[1] < BLOCK else by_key[1]
    groups: Expr = ONE
    at: Expr = ZERO
    if mentions(literal, a.i.index):
        groups = floordiv(add(a.i.extent, const(group - 1)), const(group))
        at = floordiv(TILE_LO, const(group))
    words = floordiv(add(a.j.extent, const(block * 64 - 1)), const(block * 64))
    tensor = Tensor(name, "i64", (*(x.extent for x in axes), groups, const(2), words))
    return BlockMap(tensor, (*index, at), literal, group, block)


def by_pair(literal: Expr, a: Attention) -> bool:
    """Whether a map of the literal looks at every pair of a row and a key, having no blocks."""
    return mentions(literal, a.i.index) and _key_runs(literal, a) is None


def _key_runs(literal: Expr, a: Attention) -> int | None:
    return _runs(literal, a.j.index, a.i.index)


def _row_runs(literal: Expr, a: Attention) -> int | None:
    return _runs(literal, a.i.index, a.j.index)


@lru_cache(maxsize=4096)
def _runs(literal: Expr, index: Expr, other: Expr) -> int | None:
    return runs_of(literal, index, [other])


@lru_cache(maxsize=4096)
def _in_blocks(literal: Expr, index: Expr) -> bool:
    return blocks_of(literal, index) is not None


def _askew(m: BlockMap, i: Axis, j: Axis) -> bool:
    """Whether the literal is the same throughout runs of keys, and of rows, which blocks and groups do not consist of:
    they begin elsewhere than with the first, or are longer."""
    if _runs(m.literal, j.index, i.index) is None:
        return False
    rows, keys = blocks_of(m.literal, i.index), blocks_of(m.literal, j.index)
    whole_keys = keys is not None and m.block % keys[1] == 0
    if not mentions(m.literal, i.index):
        return not whole_keys
    whole_rows = rows is not None and m.group % rows[1] == 0
    return _runs(m.literal, i.index, j.index) is not None and not (whole_rows and whole_keys)


def quick(literal: Expr, a: Attention) -> bool:
    """Whether looking at a pair costs little beside attending to it: nothing is gathered, and little computed."""
    indices = frozenset(x.index for x in (*a.batch, a.i, a.j))
    read = loads(literal)
    computed = sum(isinstance(x, Op) and mentions(x, a.j.index) for x in walk(literal))
    return computed <= MOST_COMPUTED and bool(read) and all(_straight(x, indices) for x in read)


def share(words: torch.Tensor, m: BlockMap, keys: int) -> tuple[float, float]:
    """The shares of pairs that the map leaves, and that it proves to be seen by every row."""
    some, every = (keys_in(x, m.block, keys).to(torch.float32).mean() for x in words.unbind(-2))
    return float(some), float(every)


def map_tables(
    maps: Sequence[BlockMap], a: Attention, tensors: Mapping[str, torch.Tensor], sizes: Sequence[int] = ()
) -> dict[str, torch.Tensor]:
    """The maps by name, on the device of `tensors`."""
    return {m.tensor.name: _table(m, a, tensors, sizes) for m in maps}


@dataclass(frozen=True)
class _Blocks:
    """What of a map's literal does not change with the call: the literal over the numbers of blocks of `rows` rows, 0
    where it is the same for all of them, and of `keys` keys; its loads; whether its runs lie otherwise than blocks."""

    literal: Expr
    rows: int
    keys: int
    loads: tuple[Load, ...]
    askew: bool


@lru_cache(maxsize=1024)
def _blocks(m: BlockMap, i: Axis, j: Axis) -> _Blocks:
    literal, rows, keys = m.literal, 1, 1
    if not mentions(literal, i.index):
        rows = 0
    elif (by_row := blocks_of(literal, i.index)) is not None and m.group % by_row[1] == 0:
        literal, rows = by_row
    if (by_key := blocks_of(literal, j.index)) is not None and m.block % by_key[1] == 0:
        literal, keys = by_key
    return _Blocks(literal, rows, keys, tuple(loads(literal)), _askew(m, i, j))


def _table(m: BlockMap, a: Attention, tensors: Mapping[str, torch.Tensor], sizes: Sequence[int]) -> torch.Tensor:
    table = size_table(a, sizes)
    n, keys = extent(a.i.extent, table), extent(a.j.extent, table)
    device = next(iter(tensors.values())).device
    axes = [x for x in a.batch if x.index in m.index]
    counts = [extent(x.extent, table) for x in axes]
    by = _blocks(m, a.i, a.j)
    if by.askew:
        return _by_samples(m, a, tensors, table)
    literal, width, columns = by.literal, by.keys, -(-keys // by.keys)
    rows, group = (-(-n // by.rows), m.group // by.rows) if by.rows else (1, 1)
    names: list[Expr] = [*(x.index for x in axes), a.i.index, a.j.index]
    as_it_is = isinstance(literal, Load) and group == 1 and width == m.block and not m.else_all
    if as_it_is and device.type == "cpu" and rows * columns > 0:
        assert isinstance(literal, Load)
        spans = [(0, n) for n in (*counts, rows, columns)]
        view = _view(literal, tensors[literal.tensor], dict(zip(names, spans, strict=True)), table)
        if view is not None and view.dtype == torch.bool:
            return _packed(view.expand(*counts, rows, columns))
    sized: dict[Expr, torch.Tensor] = {s: torch.tensor(v, device=device) for s, v in table.items()}
    step = max(1, _SLICE // max(1, prod(counts) * columns * group)) * group
    whole = rows // group * group
    room = cache(_room)
    found: list[torch.Tensor] = []
    cuts = [*range(0, whole, step), *([whole] if whole < rows else []), rows]
    for first, end in pairwise(cuts):
        ranges = [*((0, c) for c in counts), (first, end), (0, columns)]
        leaves = {x: _along(at, len(names), *r, device) for at, (x, r) in enumerate(zip(names, ranges, strict=True))}
        ev = Evaluator({**sized, **leaves}, tensors, DTYPE_OF[a.compute_dtype])
        ev.known |= _views(by.loads, ev, dict(zip(names, ranges, strict=True)), table)
        shape = (*counts, end - first, columns)
        found.append(torch.stack(_seen(literal, ev, shape, min(group, end - first), room, m.else_all), -2))
    return words_of(torch.cat(found, -3), m.block // width)


def _by_samples(
    m: BlockMap, a: Attention, tensors: Mapping[str, torch.Tensor], table: Mapping[Expr, int]
) -> torch.Tensor:
    """The table of a literal that is the same throughout runs of keys, looked at once for each run that a block may
    touch, and so for rows where they come in runs."""
    n, keys = extent(a.i.extent, table), extent(a.j.extent, table)
    device = next(iter(tensors.values())).device
    axes = [x for x in a.batch if x.index in m.index]
    counts = [extent(x.extent, table) for x in axes]
    rows, group = (n, m.group) if mentions(m.literal, a.i.index) else (1, 1)
    j = _samples(m.literal, a.j, keys, m.block, _key_runs(m.literal, a), device)
    i = _samples(m.literal, a.i, rows, group, _row_runs(m.literal, a), device)
    rank = len(axes) + 4  # batch, groups, rows of one, blocks, keys of one
    leaves: dict[Expr, torch.Tensor] = {s: torch.tensor(v, device=device) for s, v in table.items()}
    leaves |= {x.index: _along(at, rank, 0, c, device) for at, (x, c) in enumerate(zip(axes, counts, strict=True))}
    step = max(1, _SLICE // max(1, prod(counts) * i.shape[1] * j.numel()))
    found: list[torch.Tensor] = []
    for at in range(0, i.shape[0], step):
        part = i[at : at + step]
        ev = Evaluator(
            {**leaves, a.i.index: part[..., None, None], a.j.index: j}, tensors, DTYPE_OF[a.compute_dtype]
        )
        seen = ev(m.literal).expand(*counts, *part.shape, *j.shape).to(torch.uint8)
        found.append(torch.stack([seen.amax((-3, -1)), seen.amin((-3, -1))], -2))
    return words_of(torch.cat(found, -3), 1)


def _samples(
    literal: Expr, axis: Axis, count: int, block: int, run: int | None, device: torch.device
) -> torch.Tensor:
    """i64 (blocks, samples): of each block of `count` elements enough to meet every run that it touches."""
    offsets = [*range(0, block, run or 1), block - 1]
    if run is not None and _in_blocks(literal, axis.index) and (run % block == 0 or block % run == 0):
        offsets.pop()  # the runs begin where the blocks do
    first = torch.arange(0, count, block)[:, None]
    return torch.minimum(first + torch.tensor(sorted({*offsets})), torch.tensor(count - 1)).to(device)


def _room(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


Room = Callable[[tuple[int, ...], torch.dtype, torch.device], torch.Tensor]


def _seen(
    literal: Expr, ev: Evaluator, shape: tuple[int, ...], group: int, room: Room, else_all: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether some row and whether every row of each group sees a key, u8[.., groups, columns] of 0 and 1."""
    match literal:
        case Op("not", (x,)):
            some, every = _seen(x, ev, shape, group, room, False)  # what may see all is no negation
            return 1 - every, 1 - some
        case Op(("lt" | "le" | "eq" | "ne") as name, (a, b)) if a.kind == "float":
            x, y = ev(a), ev(b)
            # into floats, which torch does five times as fast as into bytes, in memory that is there already
            seen = room(_broadcast(x.shape, y.shape), ev.compute, x.device)
            getattr(torch, name)(x, y, out=seen)
        case _:
            seen = ev(literal).view(torch.uint8)
    seen = seen.expand(shape)
    if else_all and not (empty := 1 - seen.amax(-1, keepdim=True)).logical_not().all():
        seen = torch.maximum(seen, empty)
    seen = seen.view(*shape[:-2], -1, group, shape[-1])
    return seen.amax(-2).to(torch.uint8), seen.amin(-2).to(torch.uint8)


def _broadcast(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    wide: Callable[..., Sequence[int]] = torch.broadcast_shapes  # type: ignore[reportUnknownMemberType]
    return tuple(wide(tuple(a), tuple(b)))


def _along(at: int, rank: int, first: int, end: int, device: torch.device) -> torch.Tensor:
    view = [1] * rank
    view[at] = -1
    return torch.arange(first, end, device=device).view(view)


def _views(
    read: Sequence[Load], ev: Evaluator, ranges: Mapping[Expr, tuple[int, int]], table: Mapping[Expr, int]
) -> dict[Expr, torch.Tensor]:
    """The loads of `read` that need no gather."""
    found: dict[Expr, torch.Tensor] = {}
    for x in read:
        view = _view(x, ev.tensors[x.tensor], ranges, table)
        if view is not None:
            found[x] = view.to(torch.bool if x.kind == "bool" else torch.int64 if x.kind == "int" else ev.compute)
    return found


@lru_cache(maxsize=4096)
def _straight(x: Load, indices: frozenset[Expr]) -> list[tuple[Expr | None, Poly]] | None:
    """Of each dimension the index it goes along, one step a step, and what is added; None where it is anything else."""
    found: list[tuple[Expr | None, Poly]] = []
    for n in x.index:
        rest = poly(n)
        along = [m[0] for m, c in rest.items() if len(m) == 1 and c == 1 and m[0] in indices]
        for index in along:
            del rest[(index,)]
        if len(along) > 1 or not all(isinstance(f, Size) for m in rest for f in m):
            return None
        found.append((along[0] if along else None, rest))
    moving = [index for index, _ in found if index is not None]
    return found if len(set(moving)) == len(moving) else None


@lru_cache(maxsize=4096)
def _pairs(x: Load, indices: frozenset[Expr]) -> list[tuple[int, tuple[Expr, ...]]]:
    """Of each dimension, where it goes by `outer * size + inner`, the size and the two; 0 where it does not."""
    found: list[tuple[int, tuple[Expr, ...]]] = []
    for n in x.index:
        parts = poly(n)
        by = {int(c): m[0] for m, c in parts.items() if len(m) == 1 and m[0] in indices}
        size = max(by, default=0)
        found.append((size, (by[size], by[1])) if len(parts) == len(by) == 2 and min(by) == 1 else (0, ()))
    return found


def _view(
    x: Load, source: torch.Tensor, ranges: Mapping[Expr, tuple[int, int]], table: Mapping[Expr, int]
) -> torch.Tensor | None:
    """What a straight load gives over the ranges of the indices, as a view of its tensor; None for any other load."""
    for dim, (size, pair) in reversed(list(enumerate(_pairs(x, frozenset(ranges))))):
        if size:  # heads in groups, by two indices: of two dimensions each is one
            if ranges[pair[1]] != (0, size) or source.shape[dim] % size:
                return None
            source = source.view(*source.shape[:dim], -1, size, *source.shape[dim + 1 :])
            x = Load(x.tensor, (*x.index[:dim], *pair, *x.index[dim + 1 :]), x.kind)
    straight = _straight(x, frozenset(ranges))
    if straight is None:
        return None
    order: list[Expr] = []
    for dim, (index, rest) in reversed(list(enumerate(straight))):
        offset = sum(c * prod(table[f] for f in m) for m, c in rest.items())
        if index is None:
            source = source.select(dim, offset)
        else:
            first, end = ranges[index]
            source = source.narrow(dim, first + offset, end - first)
            order.insert(0, index)
    source = source.permute([order.index(index) for index in ranges if index in order])
    for at, index in enumerate(ranges):
        if index not in order:
            source = source.unsqueeze(at)
    return source


def _split(x: torch.Tensor, size: int) -> torch.Tensor:
    """The last dimension in runs of `size`."""
    return x.reshape(*x.shape[:-1], -1, size)


def _packed(seen: torch.Tensor) -> torch.Tensor:
    """The words of a map that a model, or a selection, gives as it is: `seen` is bool (..., rows, columns)."""
    columns = seen.shape[-1]
    words = -(-columns // 64)
    some = torch.zeros(*seen.shape[:-1], words, dtype=torch.int64)
    some.numpy().view(numpy.uint8)[..., : -(-columns // 8)] = numpy.packbits(seen.numpy(), axis=-1, bitorder="little")
    every = some.clone()
    if columns % 64:
        every[..., -1] |= -1 << columns % 64
    return torch.stack([some, every], -2)


def words_of(keys: torch.Tensor, block: int) -> torch.Tensor:
    """Bits (..., 2, columns) -> i64 (..., 2, words), a bit for each `block` columns: any of them, and all of them."""
    short = -keys.shape[-1] % (block * 64)
    some, every = keys.to(torch.uint8).unbind(-2)
    some = _split(torch.nn.functional.pad(some, (0, short), value=0), block).amax(-1)
    every = _split(torch.nn.functional.pad(every, (0, short), value=1), block).amin(-1)
    bits = _split(torch.stack([some, every], -2), 64).to(torch.int64)
    return (bits << torch.arange(64, device=keys.device)).sum(-1).contiguous()


def keys_in(words: torch.Tensor, block: int, keys: int) -> torch.Tensor:
    """i64 (..., words) -> booleans (..., keys): the keys of the blocks whose bits are set."""
    bits = (words[..., None] >> torch.arange(64, device=words.device)) & 1
    return bits.flatten(-2).to(torch.bool).repeat_interleave(block, -1)[..., :keys]
