"""Spans that grow with the length, one rule a head: the first block of keys and a band of blocks before the row.

Fu et al., 2024 (MoA: mixture of sparse attention, arXiv 2406.14909).
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from attncc.ir import Attention, Const, Expr, Program
from attncc.ir.build import ONE, ZERO, add, and_, eq, floordiv, lt, maximum, mul, or_, sub
from attncc.ir.reasons import Reason
from attncc.passes.policies.hiding import Form, Hiding, hide
from attncc.passes.policies.places import no_distance
from attncc.passes.protocol import Legality

#: Shares of the length are kept as fractions of at most this denominator, so that they are computed with integers.
_MOST_PARTS = 4096


@dataclass(frozen=True)
class Spans:
    """keep(i, j) = J = 0  or  |I - J| < max(1, alpha // block + floor(beta N / block))    I, J: blocks of row(i) and j

    `alpha`: tokens; `beta`: a share of the N keys, 0 to 1; `block`: tokens. The own block counts. N is `tokens`,
    those of the prompt and of all that will follow, so that spans are fixed when it is read; or, where that is 0, the
    number of keys of the call: of a static cache, its whole length."""

    name: ClassVar[str] = "spans"
    legality: ClassVar[Legality] = "approximate"
    alpha: int = 1024
    beta: float = 0.0
    block: int = 64
    tokens: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1 or self.block < 1:
            raise ValueError(f"beta is from 0 to 1 and block at least 1, not {self.beta} and {self.block}")
        if self.tokens < 0:
            raise ValueError(f"tokens is at least 0, not {self.tokens}")

    def __call__(self, p: Program, /) -> Program:
        return hide(p, Form(self))

    def applies(self, a: Attention) -> Reason | None:
        return no_distance(a)

    def keep(self, site: Hiding) -> Expr:
        at = site.positions
        part = Fraction(self.beta).limit_denominator(_MOST_PARTS)
        length = Const(self.tokens) if self.tokens else at.length
        grown = floordiv(mul(length, Const(part.numerator)), Const(part.denominator * self.block))
        span = maximum(add(Const(self.alpha // self.block), grown), ONE)
        rows, keys = floordiv(at.row, Const(self.block)), floordiv(at.key, Const(self.block))
        near = lt(sub(rows, keys), span)
        near = near if at.causal else and_(near, lt(sub(keys, rows), span))
        return or_(eq(keys, ZERO), near)
