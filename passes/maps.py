"""Masks that nothing but looking can bound: a map of each literal, made once per call, or once ever where constant.

A literal such as `blocks[h, i // 64, j // 64]` or `visible[b, i, j]` says nothing in closed form. Its map holds for
every group of rows

    PARTS runs of keys that cover those any row of the group sees, parted at the widest gaps
    the PARTS longest runs of keys that every row of the group sees

which bound the key loop as closed forms do. Where the literal depends on rows and keys through `i // c` and `j // c`
alone it is looked at once per block, which is all there is to see; else once per pair, in slices, so that nothing of
the size of the score matrix is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from attncc.ir import Attention, Const, Expr, Load, Op, Tensor
from attncc.ir.build import ZERO, add, and_, const, floordiv, le, lt, or_
from attncc.ir.evaluate import DTYPE_OF, Evaluator
from attncc.ir.interpret import extent, size_table
from attncc.ir.rewrite import rewrite
from attncc.ir.terms import free
from attncc.passes.predicates import mentions

PARTS = 4
_SLICE = 1 << 22  # pairs looked at at a time


@dataclass(frozen=True)
class BlockMap:
    """i32[*batch axes the literal mentions, groups of `group` rows, PARTS, 4]: first key and end of a run that some row
    sees, first key and end of one that all rows see; M and 0 where there are fewer. A literal that does not mention the
    row has one group."""

    tensor: Tensor
    index: tuple[Expr, ...]
    literal: Expr
    group: int


def block_map(literal: Expr, a: Attention, name: str, group: int) -> BlockMap:
    axes = [x for x in a.batch if x.index in free(literal)]
    index: tuple[Expr, ...] = tuple(x.index for x in axes)
    if not mentions(literal, a.i.index):
        shape = (*(x.extent for x in axes), const(1), const(PARTS), const(4))
        return BlockMap(Tensor(name, "i32", shape), (*index, ZERO), literal, 1)
    blocks = blocks_of(literal, a.i.index)
    if blocks is not None and group % blocks[1]:
        group = blocks[1]
    groups = floordiv(add(a.i.extent, const(group - 1)), const(group))
    tensor = Tensor(name, "i32", (*(x.extent for x in axes), groups, const(PARTS), const(4)))
    return BlockMap(tensor, (*index, floordiv(a.i.index, const(group))), literal, group)


def some_rows_see(m: BlockMap, j: Expr) -> Expr:
    """A predicate that the literal implies."""
    return or_(*(_run(m, part, 0, j) for part in range(PARTS)))


def all_rows_see(m: BlockMap, part: int, j: Expr) -> Expr:
    """A predicate that implies the literal: one for each part."""
    return _run(m, part, 2, j)


def _run(m: BlockMap, part: int, at: int, j: Expr) -> Expr:
    lo, hi = (Load(m.tensor.name, (*m.index, const(part), const(n)), "int") for n in (at, at + 1))
    return and_(le(lo, j), lt(j, hi))


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
        rows = 1
    elif by_row is not None:
        literal, rows, group = by_row[0], -(-n // by_row[1]), group // by_row[1]
    by_key = blocks_of(literal, a.j.index)
    width, columns = 1, keys
    if by_key is not None:
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
        some, every = (x.repeat_interleave(width, -1)[..., :keys] for x in (seen.any(-2), seen.all(-2)))
        found.append(torch.cat([_covering_runs(some), _longest_runs(every)], -1))
    return torch.cat(found, -3).to(torch.int32).contiguous()


def _covering_runs(seen: torch.Tensor) -> torch.Tensor:
    """(..., M) -> (..., PARTS, 2): runs that cover the true keys, parted at the widest gaps."""
    m = seen.shape[-1]
    j = torch.arange(m, device=seen.device)
    last = torch.where(seen, j, -1).cummax(-1).values  # the last true key up to each key
    before = torch.cat([torch.full_like(last[..., :1], -1), last[..., :-1]], -1)
    gap = torch.where(seen & (before >= 0), j - before - 1, 0)
    widest = gap.topk(min(PARTS - 1, m), -1)
    starts = torch.where(widest.values > 0, widest.indices, m)
    first = torch.where(seen.any(-1), seen.to(torch.int32).argmax(-1), m)
    starts = torch.cat([first[..., None], starts], -1).sort(-1).values
    missing = PARTS - starts.shape[-1]
    starts = torch.cat([starts, starts.new_full((*starts.shape[:-1], missing + 1), m)], -1)
    ends = torch.where(starts < m, before.gather(-1, starts.clamp(max=m - 1)), last[..., -1:]) + 1
    lo, hi = starts[..., :-1], ends[..., 1:]
    return torch.stack([lo, torch.where(lo < m, hi, 0)], -1)


def _longest_runs(seen: torch.Tensor) -> torch.Tensor:
    """(..., M) -> (..., PARTS, 2): the longest runs of true keys, in order."""
    m = seen.shape[-1]
    j = torch.arange(m, device=seen.device)
    stop = torch.where(seen, m, j).flip(-1).cummin(-1).values.flip(-1)  # the first false key from each key on
    begins = seen & ~torch.cat([torch.zeros_like(seen[..., :1]), seen[..., :-1]], -1)
    longest = torch.where(begins, stop - j, 0).topk(min(PARTS, m), -1)
    lo = torch.where(longest.values > 0, longest.indices, m)
    hi = torch.where(longest.values > 0, longest.indices + longest.values, 0)
    order = lo.argsort(-1)
    runs = torch.stack([lo.gather(-1, order), hi.gather(-1, order)], -1)
    none = runs.new_tensor([m, 0]).expand(*runs.shape[:-2], PARTS - runs.shape[-2], 2)
    return torch.cat([runs, none], -2)

