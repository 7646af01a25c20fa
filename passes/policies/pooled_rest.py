"""Pooled rest: blocks that are not visited stand by the means of their keys and values, in the same softmax.

The last step of Rectified SpaAttn (`BienLuky/Rectified-SpaAttn`) by itself, without its error bound; the means weigh as
many keys as they stand for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attncc.ir import Access, Attention, Const, Expr
from attncc.ir.build import ONE, add, and_, cast, const, maximum, not_, op, or_
from attncc.ir.expr import free, loads
from attncc.ir.reasons import Reason, because
from attncc.passes.policies.block_means import BlockMeans, by_means, shared, taken_map
from attncc.passes.policies.blocks import Blocks
from attncc.passes.policies.hiding import Hiding
from attncc.passes.policies.making import Value, reduced, rounded, selected
from attncc.passes.policies.parts import Beside, Parts, no_joining


@dataclass(frozen=True)
class PooledRest(BlockMeans):
    """keep(i, j)  as block-means, and blocks of which rows see a part
    out(i)      = ( sum over kept j of exp(s_ij) v_j  +  sum over other J of n_J exp(s_iJ) v_J ) / the same of weights

    s_iJ: the score of row i with the mean of the keys of J; v_J: the mean of its values; n_J: how many those are. The
    others are blocks that all rows of the row's block see whole. `rows`, `keys`, `take`, `amount`, `sinks`, `recent`,
    `share` as in block-means."""

    name: ClassVar[str] = "pooled-rest"
    take: str = "fraction"
    amount: float = 0.25

    def applies(self, a: Attention) -> Reason | None:
        return super().applies(a) or no_joining(a) or no_score_of_means(a)

    def keep(self, site: Hiding) -> Expr:
        return self.parts(site).keep

    def parts(self, site: Hiding) -> Parts:
        b = Blocks(site, self.rows, self.keys)
        p = shared(b, by_means(b), self.share)
        first, at = or_(b.sinks(self.sinks), b.own(self.recent)), (b.I.index, b.J.index)
        best = taken_map(b, p, self.take, self.amount, first, name="best")
        partly = and_(b.open, not_(b.whole))
        chosen = where_true(b, "map", or_(best(*at), partly))
        keep = chosen(b.of_row(b.a.i.index), b.of_key(b.a.j.index))
        rest = and_(b.whole, not_(chosen(*at)))
        return Parts(keep, beside=stood_for(b, rest))


def no_score_of_means(a: Attention) -> Reason | None:
    """Why means of keys have no score, or None: it is one of the product alone."""
    of_pairs = loads(a.score) or free(a.score) & {x.index for x in (a.i, a.j)}
    return because("policy-score-by-pair") if of_pairs else None


def stood_for(b: Blocks, rest: Expr) -> Beside:
    """The blocks of which `rest`, over I and J, is true, by their means."""
    site, a = b.site, b.a
    chosen = where_true(b, "rest", rest)
    log_count = log_of_count(b)
    k = rounded(site, b.mean_of_keys, a.tensor(a.k.tensor).dtype)
    v = rounded(site, b.mean_of_values, a.tensor(a.v.tensor).dtype)
    at = b.J.index
    return Beside(
        b.J, Access(k.name, (*k.lead, at, a.d.index)), Access(v.name, (*v.lead, at, a.e.index)),
        add(a.score, log_count(at)), chosen(b.of_row(a.i.index), at),
    )  # fmt: skip


def where_true(b: Blocks, name: str, seen: Expr) -> Value:
    """(.., I, J): a boolean over the blocks, as a map of its own."""
    return selected(b.site, name, (b.J,), const(1.0), "fraction", const(1.0), seen=seen, rows=(b.I,))


def log_of_count(b: Blocks) -> Value:
    """(.., J): the logarithm of how many keys each block holds; 0 for none."""
    one = b.site.axis("r", Const(1))
    count = op("log", cast(maximum(add(b.key_count, one.index), ONE), "float"))
    return reduced(b.site, "log_count", (b.J,), one, "max", count)
