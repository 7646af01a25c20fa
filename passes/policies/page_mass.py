"""Pages of the cache at decode, by the mass that any head of the layer gives them: one choice for all heads.

Zarch et al., 2025 (DELTA, arXiv 2510.09883), as its released code has it: `hoenza/DELTA`; chosen anew by each layer,
where there a few layers choose for those after them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attncc.ir import Attention, Const, Expr, Program
from attncc.ir.build import FALSE, and_
from attncc.ir.reasons import Reason
from attncc.passes.policies.blocks import Blocks, all_heads, no_heads
from attncc.passes.policies.hiding import Form, Hiding, hide
from attncc.passes.policies.making import over_heads, reduced, scored, selected
from attncc.passes.policies.pages import check_pages, no_decode
from attncc.passes.protocol import Legality


@dataclass(frozen=True)
class PageMass:
    """mass(i, J) = sum over j of page J of max over heads of softmax_j( score )
    keep(i, j) = page(j) is among the budget // page pages with the most mass, the last `recent` pages first

    `page`, `budget`: tokens; `recent`: pages. The weights are the model's own: every key is read once to choose, the
    values of the chosen pages alone."""

    name: ClassVar[str] = "page-mass"
    legality: ClassVar[Legality] = "approximate"
    page: int = 16
    budget: int = 1024
    recent: int = 8

    def __post_init__(self) -> None:
        check_pages(self.page, self.budget, self.recent)

    def __call__(self, p: Program, /) -> Program:
        return hide(p, Form(self))

    def applies(self, a: Attention) -> Reason | None:
        return no_heads(a) or no_decode(a)

    def keep(self, site: Hiding) -> Expr:
        b, a = Blocks(site, 1, self.page), site.attention
        q, k = (site.load(x.tensor, x.index) for x in (a.q, a.k))
        seen = and_(a.mask, b.counts(a.i.index))
        weights = scored(site, "weights", a.i, a.j, a.d, q, k, a.score, seen)
        most = over_heads(site, "most", weights, all_heads(a), (a.i, a.j), "max")
        r = site.axis("r", Const(self.page))
        j, there = b.key_at(b.J.index, r.index)
        i, _ = b.row_at(b.I.index, Const(0))
        mass = reduced(site, "mass", (b.I, b.J), r, "sum", most(i, j), b.simple(there))
        chosen = selected(
            site, "page", (b.J,), mass(b.I.index, b.J.index), "count", Const(self.budget // self.page), seen=b.open,
            first=b.own(self.recent) if self.recent else FALSE, rows=(b.I,),
        )  # fmt: skip
        return chosen(b.of_row(a.i.index), b.of_key(a.j.index))
