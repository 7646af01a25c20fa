"""The plain attention of tests: q, k, v as (B, H, N, D), with whatever a test changes."""

from __future__ import annotations

from dataclasses import replace

import torch

from attncc.ir import Access, Attention, Axis, Index, S, Tensor
from attncc.ir.build import const, mul
from attncc.ir.evaluate import NAME_OF

B, H, I, J, D, E = (Index(n) for n in "bhijde")  # noqa: E741


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **changes: object) -> Attention:
    """softmax(q k^T / sqrt(D)) v, and `changes` to its fields. `tensors` adds declarations by example."""
    (b, h, n, d), (m, e) = q.shape, v.shape[-2:]
    more = changes.pop("tensors", {})
    assert isinstance(more, dict)
    every: dict[str, torch.Tensor] = {"q": q, "k": k, "v": v, **more}
    declared = tuple(Tensor(x, NAME_OF[t.dtype], tuple(const(s) for s in t.shape)) for x, t in every.items())
    extents = {"b": b, "h": h, "i": n, "j": m, "d": d, "e": e}
    axes = {name: Axis(name, const(size)) for name, size in extents.items()}
    plain = Attention(
        sizes=(), batch=(axes["b"], axes["h"]), i=axes["i"], j=axes["j"], d=axes["d"], e=axes["e"], tensors=declared,
        q=Access("q", (B, H, I, D)), k=Access("k", (B, H, J, D)), v=Access("v", (B, H, J, E)),
        score=mul(S, const(d**-0.5)), dtype=NAME_OF[q.dtype],
    )  # fmt: skip
    return replace(plain, **changes)  # type: ignore[arg-type]
