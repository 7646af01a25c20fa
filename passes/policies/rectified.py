"""Rectified block-sparse attention: what is not visited takes its share of the weights, and means where they are exact
enough.

Rectified SpaAttn, as its released code has it: `BienLuky/Rectified-SpaAttn`, without text tokens, which Wan has not
either, and in the order in which the tokens come.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attncc.ir import Attention, Expr, Program, S
from attncc.ir.build import FALSE, add, and_, cast, const, gt, maximum, mul, not_, op, or_, sub
from attncc.ir.reasons import Reason
from attncc.passes.policies.block_means import taken_map
from attncc.passes.policies.blocks import Blocks, no_blocks
from attncc.passes.policies.hiding import Form, Hiding, hide
from attncc.passes.policies.making import Value, reduced, scored, selected
from attncc.passes.policies.parts import Parts, no_joining
from attncc.passes.policies.pooled_rest import log_of_count, no_score_of_means, where_true
from attncc.passes.protocol import Legality

#: A share of a count is rounded down, but not by what rounding took off it.
_SLACK = 1e-4


@dataclass(frozen=True)
class Rectified:
    """p(I, J)     = softmax_J( score( qm(I) . km(J) ) + log n_J )                qm, km, vm: means of blocks; n_J: keys
    keep(i, j) = J is among the fewest blocks with the share `mass` of p, and as many as the share 1 - `drop` of those
                 there are, the neighbours of I and blocks of which its rows see a part first
    exact(I, J)  = |qm . km|  >  mean|q - qm| . |km|  +  |qm| . mean|k - km|
    out(i)       = (1 - P(I)) sparse(i) + sum of p(I, J) vm(J)            over the blocks J, P: of p, that are exact and
                                                                           not kept

    `block`: tokens; `near`: neighbours on each side. The weights p are no functions of q and k to gradients."""

    name: ClassVar[str] = "rectified"
    legality: ClassVar[Legality] = "approximate"
    block: int = 128
    mass: float = 0.3
    drop: float = 0.75
    near: int = 1

    def __post_init__(self) -> None:
        if self.block < 1 or self.near < 0:
            raise ValueError("a block holds at least 1 token, near is at least 0")
        if not (0 < self.mass <= 1 and 0 <= self.drop < 1):
            raise ValueError("mass is above 0 and at most 1, drop at least 0 and below 1")

    def __call__(self, p: Program, /) -> Program:
        return hide(p, Form(self))

    def applies(self, a: Attention) -> Reason | None:
        return no_blocks(a) or no_joining(a) or no_score_of_means(a)

    def keep(self, site: Hiding) -> Expr:
        return self.parts(site).keep

    def parts(self, site: Hiding) -> Parts:
        b = Blocks(site, self.block, self.block)
        a, at = b.a, (b.I.index, b.J.index)
        x, y, d = b.mean_of_rows(), b.mean_of_keys, b.a.d
        counts = log_of_count(b)
        s = add(b.score(), counts(b.J.index))
        p = scored(site, "p", b.I, b.J, d, x(b.I.index, d.index), y(b.J.index, d.index), s, b.open)
        kept = self._kept(b, p)
        exact = _exact(b, x, y)
        rest = where_true(b, "rest", and_(b.whole, not_(kept(*at)), exact))
        share = reduced(site, "share", (b.I,), b.J, "sum", p(*at), rest(*at), const(0.0))
        weighed = mul(p(*at), b.mean_of_values(b.J.index, a.e.index))
        means = reduced(site, "means", (b.I, a.e), b.J, "sum", weighed, rest(*at))
        own = b.of_row(a.i.index)

        def after(out: Expr) -> Expr:
            return add(mul(sub(const(1.0), share(own)), out), means(own, a.e.index))

        return Parts(kept(own, b.of_key(a.j.index)), after=after)

    def _kept(self, b: Blocks, p: Value) -> Value:
        """(.., I, J): the blocks that are visited."""
        at = b.I.index, b.J.index
        heavy = taken_map(b, p, "mass", self.mass, FALSE, name="heavy")
        open_, own = cast(b.open, "int"), (b.I,)
        there, count = (
            cast(reduced(b.site, name, own, b.J, "sum", x)(b.I.index), "float")
            for name, x in (("there", open_), ("heavy", cast(heavy(*at), "int")))
        )
        least = op("floor", add(mul(const(1.0 - self.drop), there), const(_SLACK)))
        most = selected(b.site, "most", (b.J,), p(*at), "count", maximum(count, least), seen=b.open, rows=own)
        partly = and_(b.open, not_(b.whole))
        return where_true(b, "map", and_(b.open, or_(most(*at), b.around(self.near), partly)))


def _exact(b: Blocks, x: Value, y: Value) -> Expr:
    """Whether the product of the means of I and J is more than what the tokens of their blocks may differ by."""
    d = b.a.d.index

    def apart(v: Expr, mean: Expr) -> Expr:
        return op("abs", sub(v, mean))

    near = b.mean_of_rows(lambda v, at: apart(v, x(b.of_row(at), d)))
    far = b.of_keys("keys_apart", "mean", lambda v, at: apart(v, y(b.of_key(at), d)))
    u, w = x(b.I.index, d), y(b.J.index, d)
    size = op("abs", scored(b.site, "size", b.I, b.J, b.a.d, u, w, S, b.open, "none")(b.I.index, b.J.index))
    first = scored(b.site, "off", b.I, b.J, b.a.d, near(b.I.index, d), op("abs", w), S, b.open, "none")
    second = scored(b.site, "off", b.I, b.J, b.a.d, op("abs", u), far(b.J.index, d), S, b.open, "none")
    at = b.I.index, b.J.index
    return gt(size, add(first(*at), second(*at)))
