"""Blocks of keys by the product of block means: the plain form of block-sparse attention.

Jiang et al., 2024 (MInference's block-sparse heads, arXiv 2407.02490) by a count; Zhang et al., 2025 (SpargeAttn, arXiv
2502.18137) and Li et al., 2025 by mass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attncc.ir import Attention, Expr, Program
from attncc.ir.build import const, or_
from attncc.ir.reasons import Reason
from attncc.ir.reduce import Reduction
from attncc.ir.select import TAKES
from attncc.passes.policies.blocks import Blocks, group_of, no_blocks
from attncc.passes.policies.hiding import Form, Hiding, hide
from attncc.passes.policies.making import Value, over_heads, scored, selected
from attncc.passes.protocol import Legality

_REDUCTION: dict[str, Reduction] = {"max": "max", "sum": "sum", "mean": "mean"}
SHARES = ("none", *_REDUCTION)


@dataclass(frozen=True)
class BlockMeans:
    """p(I, J) = softmax_J( score( mean of q over I . mean of k over J ) )
    keep(i, j) = J is among the blocks of row block I that `take` takes by p, the own and the first `sinks` blocks first

    `rows`, `keys`: tokens of a block; `take`, `amount`: a count of blocks, a fraction of the visible ones, the mass of
    those taken, or the least p; `sinks`, `recent`: blocks, the own ones count; `share`: how the heads that read one
    head of keys agree on p (none: each selects for itself)."""

    name: ClassVar[str] = "block-means"
    legality: ClassVar[Legality] = "approximate"
    rows: int = 64
    keys: int = 64
    take: str = "mass"
    amount: float = 0.9
    sinks: int = 1
    recent: int = 1
    share: str = "none"

    def __post_init__(self) -> None:
        check(self.rows, self.keys, self.take, self.amount, self.share)

    def __call__(self, p: Program, /) -> Program:
        return hide(p, Form(self))

    def applies(self, a: Attention) -> Reason | None:
        return no_blocks(a)

    def keep(self, site: Hiding) -> Expr:
        b = Blocks(site, self.rows, self.keys)
        p = shared(b, by_means(b), self.share)
        return taken(b, p, self.take, self.amount, or_(b.sinks(self.sinks), b.own(self.recent)))


def by_means(b: Blocks) -> Value:
    """(.., I, J): the weights of block means."""
    x, y = b.mean_of_rows(), b.mean_of_keys
    d = b.a.d
    return scored(b.site, "p", b.I, b.J, d, x(b.I.index, d.index), y(b.J.index, d.index), b.score(), b.open)


def shared(b: Blocks, p: Value, share: str) -> Value:
    """(.., I, J) for each head of keys: what its heads of queries agree on, or `p` where each is on its own."""
    group = group_of(b.a)
    op = _REDUCTION.get(share)
    return p if group == 1 or op is None else over_heads(b.site, "p", p, {b.a.batch[-1]: group}, (b.I, b.J), op)


def taken(b: Blocks, p: Value, take: str, amount: float, first: Expr, seen: Expr | None = None) -> Expr:
    """Whether the block of row i takes that of key j, of those that are open or `seen`."""
    return taken_map(b, p, take, amount, first, seen)(b.of_row(b.a.i.index), b.of_key(b.a.j.index))


def taken_map(
    b: Blocks, p: Value, take: str, amount: float, first: Expr, seen: Expr | None = None, name: str = "map"
) -> Value:  # fmt: skip
    """(.., I, J): whether I takes J."""
    value = p(b.I.index, b.J.index)
    return selected(
        b.site, name, (b.J,), value, take, const(float(amount)), seen=seen or b.open, first=first, rows=(b.I,)  # type: ignore[arg-type]
    )


def check(rows: int, keys: int, take: str, amount: float, share: str = "none") -> None:
    """Raises ValueError for parameters that mean nothing."""
    if min(rows, keys) < 1:
        raise ValueError(f"a block holds at least 1 token, not {min(rows, keys)}")
    if share not in SHARES:
        raise ValueError(f"share is one of {', '.join(SHARES)}, not {share}")
    if take not in TAKES:
        raise ValueError(f"take is one of {', '.join(TAKES)}, not {take}")
    if amount < 0 or (take in ("fraction", "mass") and not 0 < amount <= 1) or (take == "count" and amount < 1):
        raise ValueError(f"{take} cannot be {amount}")
