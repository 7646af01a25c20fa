"""Intermediate roundings disappear, for kernels that keep everything in the compute type.

    bf16(x), f16(x), f32(x)  ->  x

which is more accurate than the model. Roundings under a comparison, `floor`, `ceil`, `round` or a cast to an integer
stay: there the last bit decides, and without it the model would take the other branch. The mask is left alone for the
same reason.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from attncc.ir import Attention, Expr, Op, Program
from attncc.ir.build import op
from attncc.ir.terms import ROUNDINGS
from attncc.passes.protocol import Legality, on_attentions

_DECIDES = frozenset(["lt", "le", "eq", "ne", "int", "floor", "ceil", "round", "isnan"])


@dataclass(frozen=True)
class DropRounding:
    """bf16(x), f16(x), f32(x)  ->  x"""

    name: ClassVar[str] = "drop-rounding"
    legality: ClassVar[Legality] = "exact"

    def __call__(self, p: Program, /) -> Program:
        return on_attentions(p, drop_rounding)


def drop_rounding(a: Attention) -> Attention:
    """`a` without roundings in score, weight and sink."""
    return replace(
        a,
        score=unrounded(a.score),
        weight=unrounded(a.weight),
        sink=None if a.sink is None else unrounded(a.sink),
    )


def unrounded(root: Expr) -> Expr:
    """`root` without the roundings that only cost accuracy."""
    done: dict[Expr, Expr] = {}

    def on(x: Expr) -> Expr:
        if x not in done:
            done[x] = _one(x)
        return done[x]

    def _one(x: Expr) -> Expr:
        if not isinstance(x, Op) or x.name in _DECIDES:
            return x
        if x.name in ROUNDINGS:
            return on(x.args[0])
        args = tuple(on(n) for n in x.args)
        return x if args == x.args else op(x.name, *args)

    return on(root)
