"""What the model's own form of a site takes at least: memory for its scores, time for its matrix products.

What a kernel is faster than already without more, it need not be compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from attncc.driver.candidate import Candidate
from attncc.ir import Attention
from attncc.ir.attention import Axis
from attncc.ir.interpret import extent, size_table
from attncc.patterns.softmax.anchors import SDPA

#: Scores that would fill more than this are not computed just to be timed.
_MOST_SCORE_BYTES = 1 << 30


def too_large(parts: Sequence[Candidate], sizes: Sequence[list[int]]) -> str:
    """Why the unfused form is not even set up, or nothing: what takes minutes and gigabytes is no rival."""
    if parts[0].site.node.target is SDPA:
        large = _mask_bytes(parts[0], sizes[0]) >= _MOST_SCORE_BYTES
        return "the mask that SDPA takes would fill a gigabyte" if large else ""
    total = sum(score_bytes(p, each) for p, each in zip(parts, sizes, strict=True))
    return "its scores alone would fill over a gigabyte" if total > _MOST_SCORE_BYTES else ""


def score_bytes(p: Candidate, sizes: list[int]) -> int:
    """Bytes of a site's scores in float32."""
    a = p.site.attention
    table = size_table(a, sizes)
    count = 4
    for at, axis in enumerate((*a.batch, a.i, a.j)):
        count *= 1 if at in p.site.summed else extent(axis.extent, table)
    return count


def _mask_bytes(p: Candidate, sizes: list[int]) -> int:
    """What SDPA makes of the mask it is given, in floats, for one head."""
    node, a = p.site.node, p.site.attention
    given = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    table = size_table(a, sizes)
    return 0 if given is None else 4 * extent(a.i.extent, table) * extent(a.j.extent, table)


def products(
    a: Attention, tensors: list[torch.Tensor], sizes: list[int], learned: Sequence[str] = (), *,
    recomputed: bool = False,
) -> Callable[[], object]:  # fmt: skip
    """The matrix products of an attention alone, a lower bound of every unfused form: two forward, and one for each
    gradient of `learned` with one for that of the weights; those of forward again where it is recomputed."""
    table = size_table(a, sizes)

    def dense(name: str, row: Axis, column: Axis) -> torch.Tensor:
        source = tensors[[t.name for t in a.tensors].index(name)]
        count = 1
        for axis in a.batch:
            count *= extent(axis.extent, table)
        shape = (count, extent(row.extent, table), extent(column.extent, table))
        return torch.randn(shape, device=source.device).to(source.dtype)

    given = dense(a.q.tensor, a.i, a.d), dense(a.k.tensor, a.j, a.d), dense(a.v.tensor, a.j, a.e)
    smallest = min((x.dtype for x in given), key=lambda dtype: dtype.itemsize)  # they may differ under autocast
    q, k, v = (x.to(smallest) for x in given)
    weights = torch.bmm(q, k.transpose(1, 2))
    out = torch.bmm(weights, v)

    def forward() -> None:
        torch.bmm(q, k.transpose(1, 2))
        torch.bmm(weights, v)

    def run() -> None:
        forward()
        if learned and recomputed:
            forward()
        if a.v.tensor in learned:
            torch.bmm(weights.transpose(1, 2), out)
        if set(learned) - {a.v.tensor}:
            torch.bmm(out, v.transpose(1, 2))
        if a.q.tensor in learned:
            torch.bmm(weights, k)
        if a.k.tensor in learned:
            torch.bmm(weights.transpose(1, 2), q)

    return run
