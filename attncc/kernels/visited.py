"""How much of the scores a kernel visits in one call, where what bounds its loops is data of the call."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attncc.ir import parse_attention
from attncc.kernels.build import built, optimise
from attncc.kernels.skip_tables import WORTHWHILE, Tabled
from attncc.passes.bounds.area import Area, area
from attncc.passes.bounds.bounds import loop_bounds
from attncc.passes.rewrites.forward_only import forward_only


def visited(spec: str, tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> Area:
    """The area of a call of the kernel of `spec`: with the tables that a large call makes of its masks first, or by the
    bounds alone."""
    a = optimise(forward_only(parse_attention(spec)))
    kernel = built(spec, str(tensors[0].device)).kernel
    if isinstance(kernel, Tabled) and kernel.work(sizes) >= WORTHWHILE:
        more = kernel.more(tensors, sizes)
        if more is not None:
            found = kernel.found
            names = [t.name for t in found.attention.tensors]
            return area(found.attention, found.bounds, sizes, dict(zip(names, [*tensors, *more], strict=True)))
    return area(a, loop_bounds(a, rows=True), sizes, dict(zip((t.name for t in a.tensors), tensors, strict=True)))
