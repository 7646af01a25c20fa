"""What a kernel visits in one call, where what bounds its loops is data of the call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from attncc.ir import Attention, Const, Expr, parse_attention
from attncc.ir.build import TRUE, const
from attncc.kernels.build import built, optimise
from attncc.kernels.skip_tables import WORTHWHILE, Tabled
from attncc.passes.bounds.area import Area, area, picture
from attncc.passes.bounds.bounds import loop_bounds
from attncc.passes.bounds.mask_cells import mask_cells
from attncc.passes.policies.places import head_count, heads_of
from attncc.passes.rewrites.forward_only import forward_only


@dataclass(frozen=True)
class Visit:
    """The area of a call, and its mask for the first batch point: in characters, and in the classes of `mask_cells`
    with what the kernel's loop visits. Neither where nothing is masked."""

    area: Area
    picture: str | None = None
    cells: torch.Tensor | None = None


def visited(
    spec: str, tensors: Sequence[torch.Tensor], sizes: Sequence[int], *, drawn: bool = False, head: int = 0
) -> Visit:
    """What a call of the kernel of `spec` visits: with the tables that a large call makes of its masks first, or by the
    bounds alone. `drawn`: with the mask, that of a head of the first sequence."""
    given = [t.detach().cpu() for t in tensors]
    a = optimise(forward_only(parse_attention(spec)))
    bounds = loop_bounds(a, rows=True)
    named = dict(zip((t.name for t in a.tensors), given, strict=True))
    made = built(spec, str(tensors[0].device))
    kernel = made.kernel
    if isinstance(kernel, Tabled) and kernel.work(sizes) >= WORTHWHILE:
        more = kernel.more(tensors, sizes)
        if more is not None:
            found = kernel.found
            a, bounds = found.attention, found.bounds
            named = dict(zip((t.name for t in a.tensors), [*given, *(t.cpu() for t in more)], strict=True))
    counted = area(a, bounds, sizes, named)
    counted = made.area(counted) or counted
    if not drawn or a.mask is TRUE:
        return Visit(counted)
    if head:
        a = at_head(a, head)
        bounds = loop_bounds(a, rows=True)
    return Visit(counted, picture(a, sizes, tensors=named), mask_cells(a, sizes, tensors=named, bounds=bounds))


def at_head(a: Attention, head: int) -> Attention:
    """`a` for one head alone; `a` itself where it has no such head."""
    if not 0 <= head < head_count(a):
        return a
    table: dict[Expr, Expr] = {}
    for x in reversed(heads_of(a)):
        assert isinstance(x.extent, Const)  # or it is no axis of heads
        head, own = divmod(head, int(x.extent.value))
        table[x.index] = const(own)
    alone = {x: replace(x, extent=Const(1)) if x.index in table else x for x in a.batch}
    return replace(a.substitute(table), batch=tuple(alone.values()))
