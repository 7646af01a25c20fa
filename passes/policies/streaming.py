"""Streaming heads: the first keys of the sequence and the last ones before the row.

Xiao et al., 2023 (StreamingLLM, arXiv 2309.17453); as a form of some heads, Xiao et al., 2024 (DuoAttention, arXiv
2410.10819).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attncc.ir import Attention, Const, Expr, Program
from attncc.ir.build import and_, lt, or_, sub
from attncc.ir.reasons import Reason
from attncc.passes.policies.hiding import Form, Hiding, hide
from attncc.passes.policies.places import no_distance
from attncc.passes.protocol import Legality


@dataclass(frozen=True)
class Streaming:
    """keep(i, j) = j < sinks  or  |row(i) - j| < window            `sinks`, `window`: tokens; the row's own counts"""

    name: ClassVar[str] = "streaming"
    legality: ClassVar[Legality] = "approximate"
    sinks: int = 64
    window: int = 256

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.window < 1:
            raise ValueError(f"sinks is at least 0 and window at least 1, not {self.sinks} and {self.window}")

    def __call__(self, p: Program, /) -> Program:
        return hide(p, Form(self))

    def applies(self, a: Attention) -> Reason | None:
        return no_distance(a)

    def keep(self, site: Hiding) -> Expr:
        at = site.positions
        before, behind = sub(at.row, at.key), sub(at.key, at.row)
        window = Const(self.window)
        near = lt(before, window) if at.causal else and_(lt(before, window), lt(behind, window))
        return or_(lt(at.key, Const(self.sinks)), near)
