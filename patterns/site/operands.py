"""Where an operand is read from: as deep as a copy can be saved, and no deeper than a kernel can address.

Where a kernel can address none of the tensors on the way, the operand is copied into one: small beside the scores.
"""

from __future__ import annotations

from torch import fx

from attncc.ir.affine import divide, poly
from attncc.ir.build import ZERO
from attncc.ir.expr import Const, Expr, Index, Op, Size, walk
from attncc.ir.reasons import because
from attncc.patterns.site.materialised import Source, packed
from attncc.patterns.site.reading import Facts, Point, Unreadable, move


def operand(
    f: Facts, n: fx.Node, at: Point, extents: dict[Expr, Expr], *, read: int, use: int,
    whole: frozenset[Expr] = frozenset(),
) -> Source:  # fmt: skip
    """The tensor and index to read `n[at]` from, when `n` was read at `read` and the kernel runs at `use`.

    Views cost nothing, so the walk goes below one only to get rid of a copy (the repeat of grouped heads, a
    `contiguous`). `whole` are the indices of axes that cannot be taken apart: queries, keys, components. Raises
    Unreadable where the value is overwritten before it could be read."""
    best: Source | None = None
    first, start = n, at
    when, copied = read, True
    while True:
        stable = not f.writes(n, when - 1, use)
        plain = stable and all(_addressable(x, extents, whole) for x in at)
        if plain and (copied or (best is not None and _effort(at) < _effort(best.at))):
            best, copied = Source(n, at), False
        if f.writes(n, f.order[n], when) and not _is_view(f, n):
            break
        moved = move(f, n, at, extents, crossing=not f.wants_grad(use))
        if moved is None or f.dtype(moved[0]) != f.dtype(n):
            break
        source, at = moved
        if not f.aliases(n, source):
            copied, when = True, f.order[n]
        n = source
    if best is not None:
        return best
    if f.writes(first, read - 1, use):
        raise Unreadable(first, because("operand-written"))
    return packed(f, first, start, extents, use)


def _effort(at: Point) -> int:
    """Operations in an index: fewer means that the tensor has no axis that the operand does not."""
    return sum(isinstance(x, Op) for x in walk(*at))


def _is_view(f: Facts, n: fx.Node) -> bool:
    return any(f.is_tensor(a) and f.aliases(n, a) for a in n.all_input_nodes)


def _addressable(x: Expr, extents: dict[Expr, Expr], whole: frozenset[Expr]) -> bool:
    """An integer combination of indices, and of `index // c` and `index % c` where splitting the axis removes those."""
    for monomial, _ in poly(x).items():
        if len(monomial) > 1:
            return False
        for factor in monomial:
            if isinstance(factor, Index):
                continue
            if not (isinstance(factor, Op) and factor.name in ("floordiv", "mod")):
                return False
            index, by = factor.args
            extent = extents.get(index)
            if not isinstance(index, Index) or index in whole or not isinstance(by, Const | Size) or extent is None:
                return False
            if divide(extent, by, {})[1] is not ZERO:
                return False
    return True
