"""Pages of the cache at decode, by the boxes of their keys.

Tang et al., 2024 (Quest, arXiv 2406.10774), as its released code has it: `mit-han-lab/Quest`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attncc.ir import Attention, Const, Expr, Program
from attncc.ir.build import FALSE
from attncc.ir.reasons import Reason, because
from attncc.passes.policies.block_means import SHARES, shared
from attncc.passes.policies.blocks import Blocks, no_blocks
from attncc.passes.policies.hiding import Form, Hiding, hide
from attncc.passes.policies.making import Value, boxed, selected
from attncc.passes.protocol import Legality

#: Rows of a call that select pages: each for itself.
MOST_ROWS = 64


@dataclass(frozen=True)
class Pages:
    """bound(i, J) = sum_d max( q[i, d] least_d(J), q[i, d] largest_d(J) )          >= q[i] . k[j] for every j of page J
    keep(i, j)  = page(j) is among the budget // page pages with the largest bounds, the last `recent` first

    `page`, `budget`: tokens; `recent`: pages; `share`: how the heads that read one head of keys agree on the bound
    (none: each selects for itself, as published; where they agree, each page is read once for all of them). Each row
    selects for itself: for calls of a few rows."""

    name: ClassVar[str] = "pages"
    legality: ClassVar[Legality] = "approximate"
    page: int = 16
    budget: int = 1024
    recent: int = 1
    share: str = "none"

    def __post_init__(self) -> None:
        check_pages(self.page, self.budget, self.recent)
        if self.share not in SHARES:
            raise ValueError(f"share is one of {', '.join(SHARES)}, not {self.share}")

    def __call__(self, p: Program, /) -> Program:
        return hide(p, Form(self))

    def applies(self, a: Attention) -> Reason | None:
        return no_decode(a)

    def keep(self, site: Hiding) -> Expr:
        b = Blocks(site, 1, self.page)
        bound = shared(b, by_boxes(b), self.share)
        first = b.own(self.recent) if self.recent else FALSE
        chosen = selected(
            site, "page", (b.J,), bound(b.I.index, b.J.index), "count", Const(self.budget // self.page), seen=b.open,
            first=first, rows=(b.I,),
        )  # fmt: skip
        return chosen(b.of_row(b.a.i.index), b.of_key(b.a.j.index))


def check_pages(page: int, budget: int, recent: int) -> None:
    """Raises ValueError where no pages can be chosen by these parameters."""
    if page < 1 or budget < page or recent < 0:
        raise ValueError("a page holds at least 1 token, the budget is at least a page, and recent at least 0")


def no_decode(a: Attention) -> Reason | None:
    """Why the rows of an attention cannot each select for itself, or None."""
    if not isinstance(a.i.extent, Const) or int(a.i.extent.value) > MOST_ROWS:
        return because("policy-many-rows", str(MOST_ROWS))
    return no_blocks(a)


def by_boxes(b: Blocks) -> Value:
    """(.., I, J): the bounds of products with the keys of each page."""
    return boxed(b.site, "bound", b.I, b.J, b.keys, b.key_shift, b.seen(b.a.j.index))
