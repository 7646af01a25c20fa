"""Writes in place to a part of a tensor: whether the view that was written holds an element, and where.

    x[:, a:b] = y      ->      x[i, j] = where(a <= j and j < b, y[i, j - a], what it was before)

Each view on the way from the tensor to what was written is undone: the rules of `moves` say where an element of a view
comes from, those here where an element of the tensor goes to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attncc.ir.affine import Extents, less_than, nonnegative, simplify
from attncc.ir.build import FALSE, ONE, TRUE, ZERO, and_, eq, floordiv, ge, lt, maximum, minimum, mod, sub
from attncc.ir.expr import Expr, Index
from attncc.patterns.reader.rules import Facts, Point, argument, dim_argument, written_args
from attncc.patterns.reader.view_ops import VIEW_OPS, reshape_index, slice_start

aten = torch.ops.aten


@dataclass(frozen=True)
class Place:
    """Whether a view holds an element, and where in it."""

    inside: Expr
    at: Point

    def kept(self, shape: tuple[Expr, ...], ext: Extents) -> Point:
        """A point that is inside of the view in any case."""
        return tuple(_kept(x, length, ext) for x, length in zip(self.at, shape, strict=True))


def place(f: Facts, root: fx.Node, view: fx.Node, at: Point, ext: Extents) -> Place | None:
    """Where the element `at` of `root` is in a view of it, None if the views on the way cannot be undone."""
    chain: list[fx.Node] = []
    while view is not root:
        source = view.args[0] if view.args else None
        if view.op != "call_function" or not isinstance(source, fx.Node) or not f.aliases(view, source):
            return None
        if source not in written_args(view):  # a write's own result is what it wrote to
            chain.append(view)
        view = source
    found = Place(TRUE, at)
    for n in reversed(chain):
        rule = _UNDO.get(n.target)
        step = None if rule is None else rule(f, n, found.at, ext)
        if step is None:
            return None
        found = Place(and_(found.inside, step.inside), step.at)
    return found


Rule = Callable[[Facts, fx.Node, Point, Extents], Place | None]


def _same(f: Facts, n: fx.Node, at: Point, ext: Extents) -> Place | None:
    source: Any = n.args[0]
    return Place(TRUE, at) if f.shape(n) == f.shape(source) else None


def _permute(f: Facts, n: fx.Node, at: Point, ext: Extents) -> Place | None:
    """The inverse of the permutation that the table of moves gives of as many numbers."""
    marks: Point = tuple(Index(f"mark{d}") for d in range(len(at)))
    moved = VIEW_OPS[n.target](f, n, marks, ext)
    return None if moved is None else Place(TRUE, tuple(at[moved[1].index(m)] for m in marks))


def _slice(f: Facts, n: fx.Node, at: Point, ext: Extents) -> Place | None:
    source: Any = n.args[0]
    d = dim_argument(n, len(at))
    start = slice_start(f, source, d, argument(n, "start"))
    if start is None:
        return None
    step = f.size(argument(n, "step")) if n.target is aten.slice.Tensor else ONE
    x, length = simplify(sub(at[d], start), ext), f.shape(n)[d]
    inside = TRUE if nonnegative(x, ext) else ge(x, ZERO)
    if step is not ONE:
        inside, x = and_(inside, eq(mod(x, step), ZERO)), simplify(floordiv(x, step), ext)
    if not less_than(x, length, ext):
        inside = and_(inside, lt(x, length))
    if nonnegative(sub(x, length), ext) or less_than(x, ZERO, ext):
        inside = FALSE
    return Place(inside, (*at[:d], x, *at[d + 1 :]))


def _select(f: Facts, n: fx.Node, at: Point, ext: Extents) -> Place | None:
    source: Any = n.args[0]
    d = dim_argument(n, len(at))
    chosen = slice_start(f, source, d, argument(n, "index"))
    return None if chosen is None else Place(eq(at[d], chosen), (*at[:d], *at[d + 1 :]))


def _view(f: Facts, n: fx.Node, at: Point, ext: Extents) -> Place | None:
    source: Any = n.args[0]
    return Place(TRUE, reshape_index(at, f.shape(source), f.shape(n), ext))


def _kept(x: Expr, length: Expr, ext: Extents) -> Expr:
    x = x if nonnegative(x, ext) else maximum(x, ZERO)
    return x if less_than(x, length, ext) else minimum(x, sub(length, ONE))


_PERMUTATIONS = [
    aten.transpose.int, aten.swapaxes.default, aten.swapdims.default, aten.permute.default, aten.t.default,
    aten.mT.default, aten.adjoint.default, aten.numpy_T.default, aten.movedim.int, aten.movedim.intlist,
    aten.moveaxis.int,
]  # fmt: skip

_UNDO: dict[object, Rule] = {
    **dict.fromkeys(_PERMUTATIONS, _permute),
    **dict.fromkeys([aten.detach.default, aten.alias.default, aten.contiguous.default, aten.expand.default], _same),
    **dict.fromkeys([aten.slice.Tensor, aten.narrow.default], _slice),
    aten.select.int: _select,
    **dict.fromkeys(
        [aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
         aten.unflatten.int, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims], _view),
}  # fmt: skip
