"""Local blocks and every n-th block, the strides of the heads shifted against each other.

Lin et al., 2024 (S2-Attention, arXiv 2407.17678), as its released kernels have it: `linxihui/dkernel`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attncc.ir import Attention, Const, Expr, Program
from attncc.ir.build import ZERO, add, eq, floordiv, lt, maximum, mod, mul, or_, sub
from attncc.ir.reasons import Reason, because
from attncc.passes.policies.hiding import Form, Hiding, hide
from attncc.passes.policies.places import head_count, kv_head, no_distance, places
from attncc.passes.protocol import Legality


@dataclass(frozen=True)
class Strides:
    """keep(h, i, j) = I - J < local  or  (J + g step) mod stride = 0               causal; I, J: blocks of row(i) and j
    keep(h, i, j) = (max(0, I - J - l + 1) + max(0, J - I - r + 1)) mod stride = 0   otherwise; l, r = `local` each

    g is the number of the head of keys that the query head h reads, step = max(1, stride // heads), heads those of the
    queries. `block`: tokens; `local`, `stride`: blocks, the own one counts."""

    name: ClassVar[str] = "strides"
    legality: ClassVar[Legality] = "approximate"
    block: int = 64
    local: int = 16
    stride: int = 8

    def __post_init__(self) -> None:
        if min(self.block, self.local, self.stride) < 1:
            raise ValueError("block, local and stride are at least 1")

    def __call__(self, p: Program, /) -> Program:
        return hide(p, Form(self))

    def applies(self, a: Attention) -> Reason | None:
        found = places(a)
        if found is None:
            return no_distance(a)
        return because("policy-no-heads") if found.head is None else None

    def keep(self, site: Hiding) -> Expr:
        at, a = site.positions, site.attention
        rows, keys = floordiv(at.row, Const(self.block)), floordiv(at.key, Const(self.block))
        local, stride = Const(self.local), Const(self.stride)
        if not at.causal:
            left, right = (add(sub(sub(x, y), local), Const(1)) for x, y in ((rows, keys), (keys, rows)))
            return eq(mod(add(maximum(left, ZERO), maximum(right, ZERO)), stride), ZERO)
        shifted = add(keys, mul(kv_head(a), Const(max(1, self.stride // head_count(a)))))
        return or_(lt(sub(rows, keys), local), eq(mod(shifted, stride), ZERO))
