"""Chunks of keys by the products of means over tokens and heads: one choice for all heads.

Xiong et al., 2025 (DHSA, arXiv 2510.24606), as the first form of its released code has it: `xiongsiheng/DHSA`; its
chunks end where a trained predictor says, here all but the last are equally long.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attncc.ir import Attention, Const, Expr, Program, S
from attncc.ir.build import FALSE, and_, cast, le, lt, mul, op, or_, sub
from attncc.ir.reasons import Reason
from attncc.passes.policies.blocks import Blocks, all_heads, no_blocks, no_heads
from attncc.passes.policies.hiding import Form, Hiding, hide
from attncc.passes.policies.making import over_heads, scored, selected
from attncc.passes.policies.places import no_distance
from attncc.passes.protocol import Legality


@dataclass(frozen=True)
class ChunkMeans:
    """s(I, J)    = sqrt(|I| |J|)  mean of q over I and all heads . mean of k over J and all heads
    keep(i, j) = J is among the budget // chunk chunks with the largest s(I, J); or j is one of the first `sinks` keys;
                 or |row(i) - j| < `recent`; or i is one of the last `dense` rows

    All parameters are in tokens."""

    name: ClassVar[str] = "chunk-means"
    legality: ClassVar[Legality] = "approximate"
    chunk: int = 128
    budget: int = 2048
    sinks: int = 128
    recent: int = 64
    dense: int = 64

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.budget < self.chunk or self.recent < 1 or min(self.sinks, self.dense) < 0:
            raise ValueError("chunk and recent are at least 1, the budget one chunk; sinks and dense at least 0")

    def __call__(self, p: Program, /) -> Program:
        return hide(p, Form(self))

    def applies(self, a: Attention) -> Reason | None:
        return no_heads(a) or no_distance(a) or no_blocks(a)

    def keep(self, site: Hiding) -> Expr:
        b, a, at = Blocks(site, self.chunk, self.chunk), site.attention, site.positions
        x, y = (
            over_heads(site, name, made, all_heads(a), (axis, a.d), "mean")(axis.index, a.d.index)
            for name, made, axis in (("q_mean", b.mean_of_rows(), b.I), ("k_mean", b.of_keys("keys_mean", "mean"), b.J))
        )
        # the square root of |I| is that of all chunks alike
        length = cast(b.key_count, "float")
        s = scored(site, "s", b.I, b.J, a.d, x, y, mul(S, op("sqrt", length)), b.open, "none")
        chosen = selected(
            site, "chunk", (b.J,), s(b.I.index, b.J.index), "count", Const(self.budget // self.chunk), seen=b.open,
            rows=(b.I,),
        )  # fmt: skip
        before, behind = sub(at.row, at.key), sub(at.key, at.row)
        recent = Const(self.recent)
        near = lt(before, recent) if at.causal else and_(lt(before, recent), lt(behind, recent))
        last = le(sub(a.i.extent, Const(self.dense)), a.i.index) if self.dense else FALSE
        return or_(chosen(b.of_row(a.i.index), b.of_key(a.j.index)), lt(at.key, Const(self.sinks)), near, last)
