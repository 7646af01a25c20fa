"""Blocks by their means, those whose tokens are unlike each other kept whole.

Zhang et al., 2025 (SpargeAttn, arXiv 2502.18137), as its released code has it: `thu-ml/SpargeAttn`; without its 8-bit
scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attncc.ir import Attention, Axis, Expr, Load, Program
from attncc.ir.build import and_, const, le, lt, maximum, mul, op, or_, sub
from attncc.ir.reasons import Reason
from attncc.passes.policies.block_means import check, taken
from attncc.passes.policies.blocks import Blocks, OfToken, no_blocks
from attncc.passes.policies.hiding import Form, Hiding, hide
from attncc.passes.policies.making import Value, reduced, scored
from attncc.passes.protocol import Legality

#: Tokens of no length are like none.
_TINY = 1e-24


@dataclass(frozen=True)
class SelfSimilar:
    """alike(I)   = the mean cosine of two tokens of I = | mean over I of q / |q| |^2; of J by k less its mean
    p(I, J)    = softmax_J( score( mean of q over I . mean of k less its mean over J ) where alike(J) >= `similar` )
    keep(i, j) = J is among the blocks of I that `take` takes by p, the own first; or alike(I) or alike(J) < `similar`

    `rows`, `keys`: tokens of a block; `take`, `amount` as in block-means; `similar`: a cosine."""

    name: ClassVar[str] = "self-similar"
    legality: ClassVar[Legality] = "approximate"
    rows: int = 128
    keys: int = 64
    take: str = "mass"
    amount: float = 0.98
    similar: float = 0.6

    def __post_init__(self) -> None:
        check(self.rows, self.keys, self.take, self.amount)
        if not -1 <= self.similar <= 1:
            raise ValueError(f"similar is a cosine, not {self.similar}")

    def __call__(self, p: Program, /) -> Program:
        return hide(p, Form(self))

    def applies(self, a: Attention) -> Reason | None:
        return no_blocks(a)

    def keep(self, site: Hiding) -> Expr:
        b, a = Blocks(site, self.rows, self.keys), site.attention
        q, k = (site.load(x.tensor, x.index) for x in (a.q, a.k))
        centre = reduced(site, "centre", (a.d,), a.j, "mean", k, b.seen(a.j.index))

        def centred(x: Expr, at: Expr) -> Expr:
            return sub(x, centre(a.d.index))

        alike_rows = _alike(b, b.I, b.mean_of_rows(_unit(site, "q_length", a.i, q, lambda x, at: x)))
        alike_keys = _alike(b, b.J, b.of_keys("unit_mean", "mean", _unit(site, "k_length", a.j, k, centred)))
        similar, d = const(self.similar), a.d.index
        seen = and_(b.open, le(similar, alike_keys(b.J.index)))
        x, y = b.mean_of_rows()(b.I.index, d), b.of_keys("keys_mean", "mean", centred)(b.J.index, d)
        p = scored(site, "p", b.I, b.J, a.d, x, y, b.score(), seen)
        chosen = taken(b, p, self.take, self.amount, b.own(), seen)
        row, key = b.of_row(a.i.index), b.of_key(a.j.index)
        return or_(chosen, lt(alike_rows(row), similar), lt(alike_keys(key), similar))


def _unit(site: Hiding, name: str, row: Axis, x: Load, value: OfToken) -> OfToken:
    """The components of a token made one of length 1, after `value`."""
    d, own = site.attention.d, value(x, row.index)
    length = reduced(site, name, (row,), d, "sum", mul(own, own))
    return lambda y, at: mul(value(y, at), op("rsqrt", maximum(length(at), const(_TINY))))


def _alike(b: Blocks, blocks: Axis, mean: Value) -> Value:
    """The mean cosine of two tokens of each block, by the mean of its unit vectors."""
    d = b.a.d
    x = mean(blocks.index, d.index)
    return reduced(b.site, "alike", (blocks,), d, "sum", mul(x, x))
