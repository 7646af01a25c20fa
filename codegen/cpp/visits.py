"""What the shape of a visit, known when a kernel is made, says of how to cut its rows and keys."""

from __future__ import annotations

import math
from collections.abc import Sequence

from attncc.ir import Attention, Axis, Bounds, Const
from attncc.ir.bounds import TILE_HI, TILE_LO
from attncc.ir.expr import free

_FEW = 16  # rows of a matrix unit's tile, the most that are few


def is_band(a: Attention, bounds: Bounds) -> bool:
    """Whether both ends of what a tile visits move along with its rows: a window, a neighbourhood, documents."""
    rows = {TILE_LO, TILE_HI, a.i.index, *(x.index for x in bounds.rows)}
    return bool(bounds.visit) and all(free(x.lo) & rows and free(x.hi) & rows for x in bounds.visit)


def most_few(a: Attention, folded: Sequence[Axis]) -> int:
    """Rows of a tile of few queries (see few.h, few_tiles.h) at most. Code for more takes the compiler long."""
    rows = a.i.extent
    if isinstance(rows, Const) and rows.value > _FEW:
        return 0
    extents = [x.extent for x in (a.i, *folded)]
    known = [int(x.value) for x in extents if isinstance(x, Const)]
    return min(math.prod(known), _FEW) if len(known) == len(extents) else _FEW
