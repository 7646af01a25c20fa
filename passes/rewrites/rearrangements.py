"""Rearrangements of rearrangements are one, and those that change nothing are none.

    rearrange(rearrange(x))   ->  rearrange(x)        where the groups of the second are axes of the first
    rearrange(x): a b -> a b  ->  x
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import ClassVar

from attncc.ir import Axis, Expr, Program, Rearrange, Step
from attncc.ir.affine import poly
from attncc.ir.build import ONE, mul
from attncc.ir.rearrange import Dims
from attncc.ir.rewrite import substitute
from attncc.ir.terms import free
from attncc.passes.protocol import Legality


@dataclass(frozen=True)
class MergeRearrangements:
    """rearrange(rearrange(x))  ->  rearrange(x)"""

    name: ClassVar[str] = "merge-rearrangements"
    legality: ClassVar[Legality] = "exact"

    def __call__(self, p: Program, /) -> Program:
        made = {name: step for step in p.steps for name in step.results}
        uses = [name for step in p.steps for name in step.arguments] + list(p.outputs)
        for at, step in enumerate(p.steps):
            if not isinstance(step.node, Rearrange):
                continue
            if _is_nothing(step.node):
                return self(_without(p, at))
            first = made.get(step.arguments[0])
            if first is not None and isinstance(first.node, Rearrange) and uses.count(step.arguments[0]) == 1:
                merged = _merged(first, step)
                if merged is not None:
                    steps = [merged if s is step else s for s in p.steps if s is not first]
                    return self(replace(p, steps=tuple(steps)))
        return p


def _is_nothing(a: Rearrange) -> bool:
    return a.source == a.target and not a.memory and not a.view


def _without(p: Program, at: int) -> Program:
    """The program without a step that gives what it reads."""
    (old,), (new,) = p.steps[at].results, p.steps[at].arguments
    steps = [
        replace(s, arguments=tuple(new if x == old else x for x in s.arguments))
        for n, s in enumerate(p.steps)
        if n != at
    ]
    return replace(p, steps=tuple(steps), outputs=tuple(new if x == old else x for x in p.outputs))


def _merged(first: Step, second: Step) -> Step | None:
    """Both as one, over the axes of the first and those that the second splits; None where their axes cross."""
    a, b = first.node, second.node
    assert isinstance(a, Rearrange) and isinstance(b, Rearrange)
    if a.memory or a.view:
        return None
    own = dict(zip(a.sizes, first.sizes, strict=True)), dict(zip(b.sizes, second.sizes, strict=True))
    back = {x: s for s, x in own[0].items()}

    def shared(x: Expr) -> Expr | None:
        """A size of the second, as the first calls it."""
        outer = substitute(x, {**own[1]})
        return substitute(outer, {**back}) if free(outer) <= {*back} else None

    renamed = {x.name: f"{x.name}_" if x.name in {y.name for y in a.axes} else x.name for x in b.axes}
    extents = {renamed[x.name]: shared(x.extent) for x in b.axes}
    if any(x is None for x in extents.values()):
        return None
    known = {name: x for name, x in extents.items() if x is not None}
    pairs = [_refined([(n, a.extent(n)) for n in g], [(renamed[n], known[renamed[n]]) for n in h])
             for g, h in zip(a.target, b.source, strict=True)]  # fmt: skip
    if any(x is None for x in pairs):
        return None
    of_first: dict[str, tuple[str, ...]] = {}
    of_second: dict[str, tuple[str, ...]] = {}
    axes: dict[str, Axis] = {x.name: x for x in a.axes}
    for pair in pairs:
        assert pair is not None
        of_first |= pair[0]
        of_second |= pair[1]
    for name, parts in of_first.items():
        if parts != (name,):
            axes.pop(name)
            axes |= {n: Axis(n, known[n]) for n in parts}  # type: ignore[arg-type]
    view = tuple(shared(x) for x in b.view)
    if any(x is None for x in view):
        return None
    source: Dims = tuple(tuple(n for x in g for n in of_first.get(x, (x,))) for g in a.source)
    target: Dims = tuple(tuple(n for x in g for n in of_second[renamed[x]]) for g in b.target)
    node = Rearrange(
        a.sizes, tuple(axes.values()), a.tensors, source, target, b.memory, tuple(x for x in view if x is not None)
    )
    return replace(first, node=node, results=second.results)


Sized = list[tuple[str, Expr]]


def _refined(
    first: Sized, second: Sized
) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]] | None:  # fmt: skip
    """One dimension, counted through by two lists of axes: what each axis is in axes of the other, where each axis of
    one is a run of axes of the other."""
    left: Mapping[str, tuple[str, ...]] | None = _runs(first, second)
    if left is not None:  # each of the first is a run of the second: the first splits
        return {**left}, {n: (n,) for n, _ in second}
    right = _runs(second, first)
    return None if right is None else ({n: (n,) for n, _ in first}, {**right})


def _runs(whole: Sized, parts: Sized) -> dict[str, tuple[str, ...]] | None:
    found: dict[str, tuple[str, ...]] = {}
    at = 0
    for name, extent in whole:
        run = 0
        while poly(reduce(mul, (x for _, x in parts[at : at + run]), ONE)) != poly(extent):
            run += 1
            if at + run > len(parts):
                return None
        found[name] = tuple(n for n, _ in parts[at : at + run])
        at += run
    rest = parts[at:]
    if any(x is not ONE for _, x in rest) or (rest and not whole):
        return None
    if rest:
        name = whole[-1][0]
        found[name] = (*found[name], *(n for n, _ in rest))
    return found
