"""Masks that nothing but looking can bound: a map of each literal, made once per call, or once ever where constant.

A literal such as `blocks[h, i // 64, j // 64]` or `visible[b, i, j]` says nothing in closed form. Its map holds for
every group of rows one bit for each block of keys: whether any row of the group sees a key of the block, and whether
all rows see all its keys. Where the literal depends on rows and keys through `i // c` and `j // c` alone it is looked
at once per block, which is all there is to see; else once per pair, in slices, so that nothing of the size of the score
matrix is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from attncc.ir import Attention, Const, Expr, Load, Op, Tensor
from attncc.ir.bounds import TILE_LO, Bits
from attncc.ir.build import ONE, ZERO, add, const, floordiv
from attncc.ir.evaluate import DTYPE_OF, Evaluator
from attncc.ir.interpret import extent, size_table
from attncc.ir.rewrite import rewrite
from attncc.ir.terms import free
from attncc.passes.predicates import mentions

#: Keys of a block where the literal has no blocks of its own.
BLOCK = 16
_SLICE = 1 << 22  # pairs looked at at a time


@dataclass(frozen=True)
class BlockMap:
    """i64[*batch axes the literal mentions, groups of `group` rows, 2, words]: a bit for each `block` keys, of what
    some row sees, then of what all rows see. A literal that does not mention the row has one group."""

    tensor: Tensor
    index: tuple[Expr, ...]
    literal: Expr
    group: int
    block: int

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


def blocks_of(literal: Expr, index: Expr) -> tuple[Expr, int] | None:
    """(the literal over block numbers, the block size) where `index` occurs only as `index // c` of one constant c."""
    sizes: set[int] = set()

    def rule(x: Expr) -> Expr | None:
        if isinstance(x, Op) and x.name == "floordiv" and x.args[0] is index and isinstance(x.args[1], Const):
            sizes.add(int(x.args[1].value))
            return Load("number of the block", (), "int")  # a leaf that cannot be the index itself
        return None

    hidden = rewrite(literal, rule)
    if len(sizes) != 1 or mentions(hidden, index):
        return None
    number = Load("number of the block", (), "int")
    return rewrite(hidden, lambda x: index if x is number else None), sizes.pop()


def map_tables(
    maps: Sequence[BlockMap], a: Attention, tensors: Mapping[str, torch.Tensor], sizes: Sequence[int] = ()
) -> dict[str, torch.Tensor]:
    """The maps by name, on the device of `tensors`."""
    return {m.tensor.name: _table(m, a, tensors, sizes) for m in maps}


def _table(m: BlockMap, a: Attention, tensors: Mapping[str, torch.Tensor], sizes: Sequence[int]) -> torch.Tensor:
    table = size_table(a, sizes)
    n, keys = extent(a.i.extent, table), extent(a.j.extent, table)
    device = next(iter(tensors.values())).device
    axes = [x for x in a.batch if x.index in m.index]
    counts = [extent(x.extent, table) for x in axes]
    literal, rows, group = m.literal, n, m.group
    by_row = blocks_of(literal, a.i.index)
    if not mentions(literal, a.i.index):
        rows = group = 1
    elif by_row is not None and group % by_row[1] == 0:
        literal, rows, group = by_row[0], -(-n // by_row[1]), group // by_row[1]
    by_key = blocks_of(literal, a.j.index)
    width, columns = 1, keys
    if by_key is not None and m.block % by_key[1] == 0:
        literal, width = by_key
        columns = -(-keys // width)
    leaves: dict[Expr, torch.Tensor] = {s: torch.tensor(v, device=device) for s, v in table.items()}
    for at, axis in enumerate(axes):
        view = [1] * (len(axes) + 2)
        view[at] = -1
        leaves[axis.index] = torch.arange(counts[at], device=device).view(view)
    leaves[a.j.index] = torch.arange(columns, device=device)
    pairs = columns
    for c in counts:
        pairs *= c
    step = max(1, _SLICE // max(1, pairs * group)) * group
    found: list[torch.Tensor] = []
    for first in range(0, rows, step):
        here = torch.arange(first, min(first + step, rows), device=device)
        ev = Evaluator({**leaves, a.i.index: here[:, None]}, tensors, DTYPE_OF[a.compute_dtype])
        seen = ev(literal).expand(*counts, len(here), columns)
        short = -len(here) % group  # the last group repeats its last row
        seen = torch.cat([seen, seen[..., -1:, :].expand(*counts, short, columns)], -2)
        seen = seen.reshape(*counts, -1, group, columns)
        found.append(torch.stack([seen.any(-2), seen.all(-2)], -2))
    return words_of(torch.cat(found, -3), m.block // width)


def _split(x: torch.Tensor, size: int) -> torch.Tensor:
    """The last dimension in runs of `size`."""
    return x.reshape(*x.shape[:-1], -1, size)


def words_of(keys: torch.Tensor, block: int) -> torch.Tensor:
    """Bits (..., 2, columns) -> i64 (..., 2, words), a bit for each `block` columns: any of them, and all of them."""
    short = -keys.shape[-1] % (block * 64)
    some, every = keys.unbind(-2)
    some = _split(torch.nn.functional.pad(some, (0, short), value=False), block).any(-1)
    every = _split(torch.nn.functional.pad(every, (0, short), value=True), block).all(-1)
    bits = _split(torch.stack([some, every], -2), 64).to(torch.int64)
    return (bits << torch.arange(64, device=keys.device)).sum(-1).contiguous()


def keys_in(words: torch.Tensor, block: int, keys: int) -> torch.Tensor:
    """i64 (..., words) -> booleans (..., keys): the keys of the blocks whose bits are set."""
    bits = (words[..., None] >> torch.arange(64, device=words.device)) & 1
    return bits.flatten(-2).to(torch.bool).repeat_interleave(block, -1)[..., :keys]
