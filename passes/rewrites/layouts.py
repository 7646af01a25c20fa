"""Layouts that undo each other are nothing, and attention over a grid of tokens may run with them in tile order.

    layout(inverse of layout(x))  ->  x              attention(q, k, v)  ->  undo(attention'(do(q), do(k), do(v)))
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from attncc.ir import Attention, Axis, Const, Index, Layout, Program, Size, Step, Tensor, kind_of
from attncc.ir.rewrite import substitute
from attncc.ir.terms import loads
from attncc.passes.protocol import Legality
from attncc.passes.rewrites.tile_layout import TileOrder, tile_layout


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
        steps: list[Step] = []
        for step in p.steps:
            steps += self._tiled(step) if isinstance(step.node, Attention) else [step]
        return replace(p, steps=tuple(steps))

    def _tiled(self, step: Step) -> list[Step]:
        a = step.node
        assert isinstance(a, Attention)
        order = TileOrder(self.grid, self.tile)
        after = tile_layout(a, order)
        also = {x.tensor for x in loads(a.score, a.mask, a.weight, *(x for x in (a.sink, a.drop) if x is not None))}
        if also & {x.tensor for x in (a.q, a.k, a.v)}:
            raise ValueError("an operand is read by the score or the mask, too, in the order of the tokens")
        steps: list[Step] = []
        arguments = list(step.arguments)
        for at, t in enumerate(a.tensors):
            rows = {x for x, access in ((a.i, a.q), (a.j, a.k), (a.j, a.v)) if access.tensor == t.name}
            if not rows:
                continue
            (access, *_) = (x for x in (a.q, a.k, a.v) if x.tensor == t.name)
            place = next(n for n, x in enumerate(access.index) if x in {r.index for r in rows})
            name = f"{step.results[0]}_{t.name}"
            steps.append(Step((name,), _layout(t, place, order), (arguments[at],), step.sizes))
            arguments[at] = name
        moved = tuple(f"{name}_tiled" for name in step.results)
        steps.append(replace(step, node=after, arguments=tuple(arguments), results=moved))
        for name, given, tiled in zip(step.results, kind_of(a).gives(a), moved, strict=True):
            places = {"out": [-2], "lse": [-1], "weights": [-2, -1]}[given.name]
            for n, place in enumerate(places):
                last = n == len(places) - 1
                back = _layout(given, len(given.shape) + place, order, inverse=True)
                steps.append(Step((name if last else f"{name}_{n}",), back, (tiled,), step.sizes))
                tiled = f"{name}_{n}"
        return steps


def _layout(t: Tensor, place: int, order: TileOrder, *, inverse: bool = False) -> Layout:
    sizes: dict[Size, None] = {}
    axes: list[Axis] = []
    for n, x in enumerate(t.shape):
        if not isinstance(x, Const | Size):
            raise ValueError(f"{t.name} has the extent {x!r}, which is neither a constant nor a size")
        axes.append(Axis(f"x{n}", x))
        sizes |= {x: None} if isinstance(x, Size) else {}
    source = order.position(Index(f"x{place}"))
    return Layout(tuple(sizes), tuple(axes), (replace(t, name="x"),), f"x{place}", source, inverse)
