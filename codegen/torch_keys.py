"""The keys that a block of rows visits, for the plain-torch form: loop bounds evaluated for the rows of the block.

    visit of the block  =  U over its batch points of their intervals, in their stripes

as a range where that is most of it, else as the numbers of the keys. Bits are not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from attncc.ir import Attention, Axis, Bounds, Expr, Size, W
from attncc.ir.analysis import keeps_nan, zero_at_zero
from attncc.ir.bounds import TILE_HI, TILE_LO
from attncc.ir.build import TRUE
from attncc.ir.evaluate import DTYPE_OF, Evaluator
from attncc.ir.expr import loads

#: Keys of a range beyond those that are visited, as a share, up to which a range is better than a list.
_SLACK = 1.25

Keys = tuple[int, int] | torch.Tensor


def skips(a: Attention, bounds: Bounds | None, device: str) -> bool:
    """Whether keys that no row of a block sees may be left out: they count for nothing, and the bounds can be had
    without waiting for the device."""
    if bounds is None or a.mask is TRUE or "weights" in a.outputs:
        return False
    if a.normalizer == "softmax" and a.empty != "zero" and not zero_at_zero(a.weight, W):
        return False
    if a.normalizer == "softmax" and a.empty == "nan" and not keeps_nan(a.weight, W):
        return False
    return device == "cpu" or not loads(*expressions(bounds))


def expressions(bounds: Bounds) -> list[Expr]:
    """All that the keys of a block are computed from."""
    return [r.expr for r in bounds.rows] + [n for x in bounds.visit for n in x.expressions]


def visited_keys(
    a: Attention, bounds: Bounds, tensors: Mapping[str, torch.Tensor], table: Mapping[Size, int],
    ranges: Mapping[Axis, tuple[int, int]],
) -> Keys:  # fmt: skip
    """The keys of the block of `ranges`, at least one if there are any."""
    first, end = ranges[a.i]
    keys = ranges[a.j][1]
    leaves: dict[Expr, torch.Tensor] = {s: torch.tensor(n) for s, n in table.items()}
    for at, axis in enumerate(a.batch):
        leaves[axis.index] = torch.arange(*ranges[axis]).view([-1 if n == at else 1 for n in range(len(a.batch) + 1)])
    leaves[TILE_LO], leaves[TILE_HI] = torch.tensor(first), torch.tensor(end)
    if bounds.rows:
        scan = Evaluator({**leaves, a.i.index: torch.arange(first, end)}, tensors, DTYPE_OF[a.compute_dtype])
        for r in bounds.rows:
            each = scan(r.expr).to(torch.int64)
            each = each.reshape(1) if each.ndim == 0 else each
            leaves[r.index] = each.amin(-1, keepdim=True) if r.op == "min" else each.amax(-1, keepdim=True)
    ev = Evaluator(leaves, tensors, DTYPE_OF[a.compute_dtype])
    j = torch.arange(keys)
    seen = torch.zeros(keys, dtype=torch.bool)
    for x in bounds.visit:
        lo, hi = ev(x.lo), ev(x.hi)
        if not x.stripes:
            lo, hi = lo.min(), hi.max()
        here = (j >= lo) & (j < hi)
        for s in x.stripes:
            here = here & (torch.remainder(j - ev(s.offset), ev(s.step)) < ev(s.width))
        seen |= here.reshape(-1, keys).any(0)
    found = seen.nonzero()[:, 0]
    if not len(found):
        return 0, min(1, keys)
    start, stop = int(found[0]), int(found[-1]) + 1
    return (start, stop) if stop - start <= _SLACK * len(found) else found
