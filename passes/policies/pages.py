"""Pages of the cache at decode, by the boxes of their keys.

Tang et al., 2024 (Quest, arXiv 2406.10774), as its released code has it: `mit-han-lab/Quest`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attncc.ir import Attention, Const, Expr, Load, Program, S
from attncc.ir.build import FALSE, ZERO, const, lt, maximum, minimum, mod, where
from attncc.ir.expr import substitute
from attncc.ir.reasons import Reason, because
from attncc.passes.policies.blocks import Blocks, no_blocks
from attncc.passes.policies.hiding import Form, Hiding, hide
from attncc.passes.policies.making import Value, scored, selected
from attncc.passes.protocol import Legality

#: Rows of a call that select pages: each for itself.
MOST_ROWS = 64


@dataclass(frozen=True)
class Pages:
    """bound(i, J) = sum_d max( q[i, d] least_d(J), q[i, d] largest_d(J) )          >= q[i] . k[j] for every j of page J
    keep(i, j)  = page(j) is among the budget // page pages with the largest bounds, the last `recent` first

    `page`, `budget`: tokens; `recent`: pages. Each head of queries selects for itself, each row too: for calls of a few
    rows."""

    name: ClassVar[str] = "pages"
    legality: ClassVar[Legality] = "approximate"
    page: int = 16
    budget: int = 1024
    recent: int = 1

    def __post_init__(self) -> None:
        check_pages(self.page, self.budget, self.recent)

    def __call__(self, p: Program, /) -> Program:
        return hide(p, Form(self))

    def applies(self, a: Attention) -> Reason | None:
        return no_decode(a)

    def keep(self, site: Hiding) -> Expr:
        b = Blocks(site, 1, self.page)
        bound = by_boxes(b)
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
    """(.., I, J): the bounds of products with the keys of each page. The halves of the axis that is summed over are the
    components with a positive and with a negative q."""
    a, site = b.a, b.site
    assert isinstance(a.d.extent, Const)
    width = int(a.d.extent.value)
    least, largest = b.of_keys("least", "min"), b.of_keys("largest", "max")
    c = site.axis("c", Const(2 * width))
    d, positive = mod(c.index, Const(width)), lt(c.index, Const(width))
    i, _ = b.row_at(b.I.index, ZERO)
    q = substitute(Load(a.q.tensor, a.q.index, "float"), {a.i.index: i, a.d.index: d})
    x = where(positive, maximum(q, const(0.0)), minimum(q, const(0.0)))
    y = where(positive, largest(b.J.index, d), least(b.J.index, d))
    return scored(site, "bound", b.I, b.J, c, x, y, S, b.open, "none")
