"""Layouts that undo each other are nothing, and attention over a grid of tokens may run with them in tile order.

    layout(inverse of layout(x))  ->  x              attention(q, k, v)  ->  undo(attention'(do(q), do(k), do(v)))
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from attncc.ir import Layout, Program, Step
from attncc.ir.rewrite import substitute
from attncc.passes.protocol import Legality
from attncc.passes.rewrites.in_order import Known, in_order
from attncc.passes.rewrites.tile_layout import TileOrder


@dataclass(frozen=True)
class CancelLayouts:
    """layout(inverse of layout(x))  ->  x, and the other way round"""

    name: ClassVar[str] = "cancel-layouts"
    legality: ClassVar[Legality] = "exact"

    def __call__(self, p: Program, /) -> Program:
        made = {name: step for step in p.steps for name in step.results}
        for step in p.steps:
            first = made.get(step.arguments[0]) if isinstance(step.node, Layout) else None
            if first is not None and _undoes(step, first):
                new, (old,) = first.arguments[0], step.results
                steps = [
                    replace(s, arguments=tuple(new if x == old else x for x in s.arguments))
                    for s in p.steps
                    if s is not step
                ]
                return self(replace(p, steps=tuple(steps), outputs=tuple(new if x == old else x for x in p.outputs)))
        return p


def _undoes(second: Step, first: Step) -> bool:
    a, b = first.node, second.node
    if not (isinstance(a, Layout) and isinstance(b, Layout)) or a.inverse == b.inverse or a.place != b.place:
        return False
    same_reads = first.arguments[1:] == second.arguments[1:]
    names = {x.index: y.index for x, y in zip(a.axes, b.axes, strict=True)} if len(a.axes) == len(b.axes) else {}
    sizes = dict(zip(a.sizes, first.sizes, strict=True)), dict(zip(b.sizes, second.sizes, strict=True))
    as_second = substitute(substitute(a.source, {**names}), {**sizes[0]})
    return same_reads and bool(names) and as_second == substitute(b.source, {**sizes[1]})


@dataclass(frozen=True)
class DropUnused:
    """steps whose results nobody reads  ->  none"""

    name: ClassVar[str] = "drop-unused"
    legality: ClassVar[Legality] = "exact"

    def __call__(self, p: Program, /) -> Program:
        needed = {*p.outputs}
        kept: list[Step] = []
        for step in reversed(p.steps):
            if needed & {*step.results}:
                kept.append(step)
                needed |= {*step.arguments}
        return p if len(kept) == len(p.steps) else replace(p, steps=tuple(reversed(kept)))


@dataclass(frozen=True)
class TileTokens:
    """attention over tokens of a grid  ->  the same over tokens in tile order, between layouts

    Raises ValueError where an attention's rows and keys are not the tokens of the grid."""

    name: ClassVar[str] = "tile-tokens"
    legality: ClassVar[Legality] = "exact"

    grid: tuple[int, ...]
    tile: tuple[int, ...]

    def __call__(self, p: Program, /) -> Program:
        return in_order(p, Known(TileOrder(self.grid, self.tile)))
