"""What a rule of an operator is written with: the values of its inputs at a point, and what a node says of itself.

A rule is a row of a table (`VIEW_OPS`, `ELEMENTS`, `SOURCES`). It asks for values by `Values` alone, so that no table
knows of the reader that walks them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import fx

from attncc.ir.expr import Expr, Load
from attncc.patterns.graph import (
    Facts,
    Gradients,
    argument,
    asked_once,
    dim_argument,
    formula,
    has_argument,
    hint,
    op_name,
    reduction,
    skip_casts,
    spelled_out,
    takes_tensors,
    written_args,
)
from attncc.patterns.reader.assumptions import Reach

__all__ = [
    "Facts", "Gradients", "Point", "Rule", "Values", "argument", "asked_once", "dim_argument", "formula",
    "has_argument", "hint", "op_name", "reduction", "skip_casts", "spelled_out", "takes_tensors", "written_args",
]  # fmt: skip

Point = tuple[Expr, ...]


class Values(Protocol):
    """Who tells what tensors are at an index. `extents` bounds every index; with `reach`, values are read where some
    conditions hold; `given` are the values of nodes that it was told, as the arguments of a graph of scalars are."""

    facts: Facts
    extents: dict[Expr, Expr]
    reach: Reach | None

    @property
    def given(self) -> Mapping[fx.Node, Expr]: ...

    def followed(self, n: fx.Node) -> bool:
        """Whether gradients flow into what an operation gives."""
        ...

    def value_at(self, n: fx.Node, at: Point, reader: int | None = None) -> Expr:
        """The value of `n` at `at`, as the operator at position `reader` of the graph saw it."""
        ...

    def load(self, n: fx.Node, at: Point) -> Load:
        """The element itself, loaded from the tensor."""
        ...

    def selected(self, c: Expr, yes: Callable[[], Expr], no: Callable[[], Expr]) -> Expr:
        """One value where a condition holds, another elsewhere, each read where it is."""
        ...


Rule = Callable[[Values, fx.Node, Point], Expr | None]
