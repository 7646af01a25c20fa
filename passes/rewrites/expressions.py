"""Applying a function to every expression of an attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from attncc.ir import Access, Attention, Expr


def map_expressions(a: Attention, f: Callable[[Expr], Expr]) -> Attention:
    """`a` with `f` applied to each expression as a whole, operand indices included."""

    def access(x: Access) -> Access:
        return Access(x.tensor, tuple(f(n) for n in x.index))

    return replace(
        a,
        q=access(a.q), k=access(a.k), v=access(a.v), score=f(a.score), mask=f(a.mask),
        sink=None if a.sink is None else f(a.sink), weight=f(a.weight), drop=None if a.drop is None else f(a.drop),
    )  # fmt: skip
