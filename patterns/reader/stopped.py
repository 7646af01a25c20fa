"""Values without the gradients that the model stops: `stop(x)` at each load whose gradient would flow otherwise.

A tensor that autograd does not follow, read through what it is computed from, is made of loads that it may follow. The
tensor itself is loaded in place of a plain load, as its gradients are stopped already.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import fx

from attncc.ir.build import stop
from attncc.ir.expr import Expr, Load
from attncc.patterns.reader.contractions import DOT
from attncc.patterns.reader.rules import Facts, Gradients, Point


class Following(Protocol):
    """A reader that knows which loads stand for scores and weights, and reads for position `use` of the graph. `given`
    are the values of nodes that it was told."""

    facts: Facts
    use: int

    @property
    def given(self) -> Mapping[fx.Node, Expr]: ...

    def is_own(self, x: Load) -> bool: ...

    def load_later(self, n: fx.Node, at: Point, when: int) -> Expr: ...


def without_stopped(r: Following, g: Gradients, n: fx.Node, value: Expr, at: Point, when: int) -> Expr:
    """`value`, which `n` holds at a point as position `when` reads it, without gradients where autograd does not follow
    `n` there."""
    if value.kind != "float" or not g.stopped(n, max(when, r.facts.order[n] + 1)):
        return value

    def flows(x: Expr) -> bool:
        if not isinstance(x, Load):
            return True
        node = r.facts.by_name[x.tensor.removeprefix(DOT)]
        return g.reached(node) if r.is_own(x) else g.follows(node, r.use)

    if isinstance(value, Load) and not r.is_own(value) and not r.given:
        return r.load_later(n, at, when) if flows(value) else value
    return stop(value, flows)
