"""The mask that the tables of a `BlockMask` say, for one that has no function of its own.

    kv_num_blocks[b, h, i // R]                     how many blocks of keys a block of R queries sees
    kv_indices[b, h, i // R, :that]                 which

The kernel reads a table of truth values, one for each pair of blocks. What `flex_attention` computes when it is not
compiled does not look at the tables; compiled, it sees these blocks and no others, here as there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from attncc.ir.affine import poly
from attncc.ir.build import FALSE, ONE, ZERO, add, const, floordiv, or_
from attncc.ir.expr import Expr, Load
from attncc.patterns.site import Facts, Point, fitted

aten = torch.ops.aten


def mask_of_blocks(f: Facts, blocks: Any, at: Point, keys: Expr, use: int) -> Expr | None:
    """Which keys the blocks of a flex_attention node show at (b, h, i, j); None where their tables do not list every
    block of keys, or their sizes are not known."""
    *_, rows, columns, _ = blocks
    if not isinstance(rows, int) or not isinstance(columns, int):
        return None
    count = floordiv(add(keys, const(columns - 1)), const(columns))
    seen: Expr = FALSE
    for number, indices in ((blocks[2], blocks[3]), (blocks[4], blocks[5])):
        if number is None or indices is None:
            continue
        if not (f.is_tensor(number) and f.is_tensor(indices)) or f.rank(indices) != 4 or f.rank(number) != 3:
            return None
        if poly(f.shape(indices)[-1]) != poly(count):
            return None
        table = f.make_once(("blocks", number, indices), lambda a=number, b=indices: _shown(f, a, b, use))
        batch = fitted(f.shape(table)[:2], at[:2])
        place = (*batch, *(floordiv(x, const(size)) for x, size in zip(at[2:], (rows, columns), strict=True)))
        place = tuple(ZERO if s is ONE else x for x, s in zip(place, f.shape(table), strict=True))
        seen = or_(seen, Load(table.name, place, "bool"))
    return seen


def _shown(f: Facts, number: fx.Node, indices: fx.Node, use: int) -> fx.Node:
    """A truth value for each pair of blocks: (batch, heads, blocks of queries, blocks of keys)."""
    every = f.make(aten.ones_like.default, (indices,), use)
    place = f.make(aten.cumsum.default, (every, -1), use)
    listed = f.make(aten.le.Tensor, (place, f.make(aten.unsqueeze.default, (number, -1), use)), use)
    listed = f.make(aten.to.dtype, (listed, torch.int32), use)
    where = f.make(aten.to.dtype, (indices, torch.int64), use)
    none = f.make(aten.zeros_like.default, (listed,), use)
    shown = f.make(aten.scatter_reduce.two, (none, -1, where, listed, "amax"), use)
    return f.make(aten.to.dtype, (shown, torch.bool), use)
