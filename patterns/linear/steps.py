"""One expression for all steps of a loop."""

from __future__ import annotations

from attncc.ir.build import add, const, op
from attncc.ir.expr import Const, Expr, Load, Op


def common(xs: list[Expr], time: Expr) -> Expr | None:
    """One expression for all steps: constants that count the steps become the time."""
    first = xs[0]
    if all(x is first for x in xs):
        return first
    if all(isinstance(x, Const) and isinstance(x.value, int) for x in xs):
        values = [int(x.value) for x in xs if isinstance(x, Const)]
        counts = values == list(range(values[0], values[0] + len(values)))
        return add(time, const(values[0])) if counts else None
    if all(isinstance(x, Load) for x in xs):
        same = {(x.tensor, x.kind, len(x.index)) for x in xs if isinstance(x, Load)}
    else:
        same = {(x.name, "", len(x.args)) if isinstance(x, Op) else (repr(x), "", 0) for x in xs}
    children = [common(list(column), time) for column in zip(*(x.children for x in xs), strict=False)]
    if len(same) != 1 or any(c is None for c in children):
        return None
    held = tuple(c for c in children if c is not None)
    if isinstance(first, Load):
        return Load(first.tensor, held, first.kind)
    return op(first.name, *held) if isinstance(first, Op) else None
