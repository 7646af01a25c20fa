"""What a pass is: a frozen dataclass, from a program to one that computes the same, or nearly so where it says."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal, Protocol

from attncc.ir import Attention, Program

#: `exact`: equal but for rounding; `approximate`: needs a plan; `trained`: needs weights that were trained for it.
Legality = Literal["exact", "approximate", "trained"]


class Pass(Protocol):
    """`name` is its spelling in `attncc opt -p`; its fields are its parameters."""

    name: ClassVar[str]
    legality: ClassVar[Legality]

    def __call__(self, p: Program, /) -> Program: ...


def on_attentions(p: Program, change: Callable[[Attention], Attention]) -> Program:
    """`p` with each attention changed to one that reads and gives the same; `p` itself where nothing changed."""
    nodes = [change(s.node) if isinstance(s.node, Attention) else s.node for s in p.steps]
    return p if all(n is s.node for n, s in zip(nodes, p.steps, strict=True)) else p.with_nodes(nodes)
