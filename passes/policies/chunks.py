"""Chunks: each row sees the keys of its own chunk of the sequence, as the local layers of Llama 4 do.

Parmar et al., 2018 (block-local attention; Image Transformer, arXiv 1802.05751).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attncc.ir import Attention, Const, Expr, Program
from attncc.ir.build import eq, floordiv
from attncc.ir.reasons import Reason
from attncc.passes.policies.hiding import Form, Hiding, hide
from attncc.passes.policies.places import no_distance
from attncc.passes.protocol import Legality


@dataclass(frozen=True)
class Chunks:
    """keep(i, j) = row(i) // size = j // size                                          `size`: tokens of a chunk"""

    name: ClassVar[str] = "chunks"
    legality: ClassVar[Legality] = "approximate"
    size: int = 1024

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size is at least 1, not {self.size}")

    def __call__(self, p: Program, /) -> Program:
        return hide(p, Form(self))

    def applies(self, a: Attention) -> Reason | None:
        return no_distance(a)

    def keep(self, site: Hiding) -> Expr:
        at = site.positions
        return eq(floordiv(at.row, Const(self.size)), floordiv(at.key, Const(self.size)))
