"""Orders of the tokens of a picture or a film, in which what belongs together lies together, each exact.

    order-tokens     the sides of the grid in another order: frame, height and width of a film as one wants them
    curve-tokens     along a curve that fills the grid, each token next to the one before it
    cluster-tokens   by the clusters of their keys, anew in each call

Between layouts (in_order.py); the policies behind them in a pipeline see tokens in that order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import ClassVar

from attncc.ir import Attention, Axis, Const, Expr, Load, Program, Table
from attncc.ir.attention import Tensor, fresh_name
from attncc.ir.build import ZERO, add, const, floordiv, mod, mul
from attncc.ir.order import Order
from attncc.ir.terms import free
from attncc.passes.protocol import Legality
from attncc.passes.rewrites.curve import curve
from attncc.passes.rewrites.in_order import Known, Read, in_order


@dataclass(frozen=True)
class SideOrder:
    """A grid whose sides are counted in another order: side `sides[0]` of `grid` is the slowest."""

    grid: tuple[int, ...]
    sides: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return prod(self.grid)

    def position(self, t: Expr) -> Expr:
        """The row-major number of the token at `t` in this order."""
        result: Expr = ZERO
        for n, side in enumerate(self.sides):
            faster = prod(self.grid[s] for s in self.sides[n + 1 :])
            at = mod(floordiv(t, const(faster)), const(self.grid[side]))
            result = add(result, mul(at, const(prod(self.grid[side + 1 :]))))
        return result


@dataclass(frozen=True)
class OrderTokens:
    """attention over tokens of a grid  ->  the same with the sides of the grid in the order `sides`, between layouts

    `grid`: tokens per side, slowest first; `sides`: the numbers of the sides, slowest first. Of the frames, heights and
    widths 0, 1, 2 of a film there are six orders (PAROAttention, `jamescsq47/PAROAtten`). Raises ValueError where an
    attention's rows and keys are not the tokens of the grid."""

    name: ClassVar[str] = "order-tokens"
    legality: ClassVar[Legality] = "exact"

    grid: tuple[int, ...]
    sides: tuple[int, ...]

    def __post_init__(self) -> None:
        if sorted(self.sides) != [*range(len(self.grid))]:
            raise ValueError(f"sides are the numbers 0 to {len(self.grid) - 1} of those of the grid, each once")

    def __call__(self, p: Program, /) -> Program:
        return in_order(p, Known(SideOrder(self.grid, self.sides)))


@dataclass(frozen=True)
class CurveTokens:
    """attention over tokens of a grid  ->  the same with the tokens along a generalised Hilbert curve, between layouts

    `grid`: tokens per side, slowest first, of two or three sides. Raises ValueError where an attention's rows and keys
    are not the tokens of the grid."""

    name: ClassVar[str] = "curve-tokens"
    legality: ClassVar[Legality] = "exact"

    grid: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.grid) not in (2, 3) or min(self.grid) < 1:
            raise ValueError("a curve fills a grid of two or three sides")

    def __call__(self, p: Program, /) -> Program:
        def make(a: Attention) -> Table:
            taken = {x.name for x in (*a.axes, *a.sizes, *a.tensors)}
            axis = Axis(fresh_name("t", taken), Const(prod(self.grid)))
            return Table((), (axis,), _without_sizes(a), _along(self.grid))

        return in_order(p, Read(make, lambda a: ()))


@dataclass(frozen=True)
class ClusterTokens:
    """attention whose rows are its keys  ->  the same with tokens sorted by the clusters of their keys, between layouts

    `clusters` by k-means in `rounds`, from tokens evenly spread, for each head of keys; heads of queries that read one
    share its order. A stable sort. After Sparse VideoGen 2 (`svg-project/Sparse-VideoGen`), where rows have clusters of
    their own. Raises ValueError where rows are not the keys."""

    name: ClassVar[str] = "cluster-tokens"
    legality: ClassVar[Legality] = "exact"

    clusters: int = 16
    rounds: int = 2

    def __post_init__(self) -> None:
        if self.clusters < 1 or self.rounds < 0:
            raise ValueError("there is at least 1 cluster, and no fewer rounds than none")

    def __call__(self, p: Program, /) -> Program:
        return in_order(p, Read(self._make, lambda a: tuple(x for x in a.k.index if x not in (a.j.index, a.d.index))))

    def _make(self, a: Attention) -> Order:
        (t,) = (t for t in a.tensors if t.name == a.k.tensor)
        if any(not isinstance(n, Const) for n in t.shape):
            raise ValueError("the number of tokens is known at the call alone")
        kept = [(n, x) for n, x in enumerate(a.k.index) if x not in (a.j.index, a.d.index)]
        if len(kept) + 2 != len(a.k.index) or any(not free(x) for _, x in kept):
            raise ValueError("the keys are not read by a dimension of their tokens and one of their components")
        own = [Axis(f"x{n}", t.shape[n]) for n, _ in kept]  # type: ignore[arg-type]
        table = dict(zip((n for n, _ in kept), (x.index for x in own), strict=True))
        at = tuple(table.get(n, x) for n, x in enumerate(a.k.index))
        return Order((), tuple(own), a.j, a.d, (t,), Load(t.name, at, "float"), self.clusters, self.rounds)


def _without_sizes(a: Attention) -> tuple[Tensor, ...]:
    """A tensor of the attention of known shape, for the device that it lies on."""
    known = [t for t in a.tensors if all(isinstance(n, Const) for n in t.shape)]
    if not known:
        raise ValueError("the number of tokens is known at the call alone")
    return (known[0],)


@lru_cache(maxsize=32)
def _along(grid: tuple[int, ...]) -> tuple[int, ...]:
    """The row-major number of each token along the curve."""
    found: list[int] = []
    for point in curve(grid):
        number = 0
        for side, x in zip(grid, point, strict=True):
            number = number * side + x
        found.append(number)
    return tuple(found)

