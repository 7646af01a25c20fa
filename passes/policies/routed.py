"""Streaming, or all keys, decided for each sequence by what streaming would miss.

After Flux Attention (`qqtang-code/FluxAttention`), whose trained router sends each sequence of a layer to full or to
streaming attention. Here a measured quantity decides, so that no router has to be trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attncc.ir import Attention, Expr, Program
from attncc.ir.build import const, lt, not_, or_
from attncc.ir.reasons import Reason
from attncc.passes.policies.blocks import Blocks, all_heads, no_blocks, no_heads
from attncc.passes.policies.hiding import Form, Hiding, hide
from attncc.passes.policies.making import over_heads, reduced
from attncc.passes.policies.places import no_distance
from attncc.passes.policies.sample import Sample
from attncc.passes.policies.streaming import Streaming
from attncc.passes.protocol import Legality


@dataclass(frozen=True)
class RoutedStreaming:
    """missed     = mean over the last `rows` rows and all heads of  sum_j w(i, j) where not near(i, j)
    keep(i, j) = near(i, j)  or  missed > `miss`              near: streaming{sinks, window}; w: the model's weights

    A sequence of the batch is routed by itself, all heads of the attention alike, anew in each call. `sinks`, `window`
    and `rows` are tokens, `miss` a share of the weights."""

    name: ClassVar[str] = "routed-streaming"
    legality: ClassVar[Legality] = "approximate"
    sinks: int = 128
    window: int = 1024
    miss: float = 0.05
    rows: int = 16

    def __post_init__(self) -> None:
        Streaming(self.sinks, self.window)
        if self.rows < 1 or not 0 <= self.miss < 1:
            raise ValueError("rows is at least 1, and miss a share from 0 to less than 1")

    def __call__(self, p: Program, /) -> Program:
        return hide(p, Form(self))

    def applies(self, a: Attention) -> Reason | None:
        return no_heads(a) or no_distance(a) or no_blocks(a)

    def keep(self, site: Hiding) -> Expr:
        a = site.attention
        near = Streaming(self.sinks, self.window).keep(site)
        sample = Sample(Blocks(site, self.window, self.window), self.rows)
        r, nothing = sample.rows, const(0.0)
        weight = sample.weights(r.index, a.j.index)
        gone = reduced(site, "gone", (r,), a.j, "sum", weight, not_(sample.of_rows(near)), nothing)
        mean = reduced(site, "gone_mean", (), r, "mean", gone(r.index), sample.there, nothing)
        missed = over_heads(site, "missed", mean, all_heads(a), (), "mean")
        return or_(lt(const(self.miss), missed()), near)
