"""What a sum over one dimension is made of, where that is a product of two tensors written out element by element, or
the square of their difference.

    sum_d q[.., i, 1, d] * k[.., 1, j, d]              sum_d (q[.., i, 1, d] - k[.., 1, j, d])^2
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import fx

from attncc.ir.build import ONE
from attncc.ir.expr import Const, Expr, Index, free
from attncc.patterns.reader.rules import Facts, Point, argument, asked_once, op_name, spelled_out
from attncc.patterns.reader.view_ops import VIEW_OPS, broadcast, move, stops

aten: Any = torch.ops.aten
_STEPS = 12
SUMS_AND_MEANS = (aten.sum.dim_IntList, aten.mean.dim)
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Factor:
    """`node[at(point)]`, a factor of what is summed at `point`."""

    node: fx.Node
    at: Callable[[Point], Point]


@dataclass(frozen=True)
class Written:
    """`sum_c scale * a[..] * b[..]` over dimension `dim` (put back as an extent of 1 where `kept`) of what `source`
    holds; of the squared difference of a and b where `squared`."""

    source: fx.Node
    factors: tuple[Factor, Factor]
    dim: int
    kept: bool
    extent: Expr
    scale: float
    squared: bool = False


@asked_once
def written_out(f: Facts, n: fx.Node) -> Written | None:
    """The product that a sum over one dimension is, or None where it is something else."""
    source: Any = n.args[0]
    if n.target not in SUMS_AND_MEANS or not f.is_tensor(source):
        return None
    given = argument(n, "dim")
    dims = cast("list[int]", given) if isinstance(given, list | tuple) else []
    if len(dims) != 1:
        return None
    if f.dtype(n) not in _FLOATS or f.dtype(source) not in _FLOATS:
        return None
    dim = dims[0] % max(f.rank(source), 1)
    extent = f.shape(source)[dim]
    scale = 1.0
    if n.target is aten.mean.dim:
        if not isinstance(extent, Const) or extent.value == 0:
            return None
        scale = 1.0 / extent.value
    kept = bool(argument(n, "keepdim"))
    point = tuple(Index(f"x{d}") for d in range(f.rank(source)))
    for steps in (_STEPS, 1) if extent is not ONE else ():
        found = _Search(f, n, scale)
        if not found.descend(source, lambda at: at, steps):
            return None
        sides = found.difference or _sides(f, found.factors, point, f.order[n])
        if sides is not None and all(point[dim] in _spans(x, point) for x in sides):
            if _spans(sides[0], point) == _spans(sides[1], point):
                return None  # one number a row: no row meets other rows
            return Written(source, sides, dim, kept, extent, found.scale, found.difference is not None)
    return None


def factored(f: Facts, n: fx.Node, source: fx.Node) -> list[Factor] | None:
    """The two tensors that `source` is the product of, as `n` reads it; None where it is none of just two."""
    for steps in (1, 2, _STEPS):
        found = _Search(f, n, 1.0)
        if found.descend(source, lambda at: at, steps) and found.scale == 1.0 and len(found.factors) == 2:
            return found.factors
    return None


@dataclass
class _Search:
    """What a tensor is the product of, looked for down from the sum `n` that reads it."""

    f: Facts
    n: fx.Node
    scale: float

    def __post_init__(self) -> None:
        self.factors: list[Factor] = []
        self.difference: tuple[Factor, Factor] | None = None

    def descend(self, x: Any, at: Callable[[Point], Point], steps: int = _STEPS) -> bool:
        """Whether `x` was taken apart. False where the model writes to a factor before its product is summed."""
        if isinstance(x, int | float):
            self.scale *= x
            return True
        if not self.f.is_tensor(x) or self._written(x):
            return False
        if self._stopped(x):
            self.factors.append(Factor(x, at))
            return True
        rule = None if steps == 0 or x.op != "call_function" else _DOWN.get(op_name(x).rstrip("_"))
        if rule is not None and (found := rule(self, x, at, steps - 1)) is not None:
            return found
        spread = spread_from(self.f, x)
        if spread is not None and not self._written(spread[0]):
            return self.descend(spread[0], lambda point: spread[1](at(point)), steps)
        moved = self._moved(x, at) if steps else None
        if moved is not None and self.descend(moved[0], moved[1], steps - 1):
            return True
        self.factors.append(Factor(x, at))
        return True

    def _written(self, x: fx.Node) -> bool:
        return bool(self.f.writes(x, self.f.order[x], self.f.order[self.n]))

    def _stopped(self, x: fx.Node) -> bool:
        """Whether gradients that flow into the sum, and would flow below a factor, are stopped there."""
        wants_grad = self.f.wants_grad(self.f.order[self.n])
        return wants_grad and any(stops(self.f, x, a) for a in x.all_input_nodes if self.f.is_tensor(a))

    def _moved(self, x: fx.Node, at: Callable[[Point], Point]) -> tuple[fx.Node, Callable[[Point], Point]] | None:
        """What a product is a permutation of; an operand that is moved is read where it lies."""
        if x.target not in _PERMUTES:
            return None
        source: Any = x.args[0]
        if op_name(source).rstrip("_") not in ("mul", "multiply", "einsum", "pow", "square"):
            return None

        def below(point: Point) -> Point:
            found = move(self.f, x, at(point), {}, crossing=True)
            assert found is not None
            return found[1]

        return source, below

    def product(self, x: fx.Node, at: Callable[[Point], Point], steps: int) -> bool | None:
        a, b = x.args[:2]
        if self.f.dtype(x) not in _FLOATS:
            return None
        if a is b:
            return self.square(x, at, steps)
        return self.descend(a, self._broadcast(a, at), steps) and self.descend(b, self._broadcast(b, at), steps)

    def divided(self, x: fx.Node, at: Callable[[Point], Point], steps: int) -> bool | None:
        by = x.args[1]
        if not isinstance(by, int | float) or by == 0 or x.kwargs.get("rounding_mode") is not None:
            return None
        self.scale /= by
        return self.descend(x.args[0], at, steps)

    def negated(self, x: fx.Node, at: Callable[[Point], Point], steps: int) -> bool | None:
        self.scale = -self.scale
        return self.descend(x.args[0], at, steps)

    def cast(self, x: fx.Node, at: Callable[[Point], Point], steps: int) -> bool | None:
        source: Any = x.args[0]
        wider = self.f.dtype(x) in (torch.float32, torch.float64) and self.f.dtype(source) in _FLOATS
        return self.descend(source, at, steps) if wider and _is_computed(source) else None

    def detached(self, x: fx.Node, at: Callable[[Point], Point], steps: int) -> bool | None:
        return self.descend(x.args[0], at, steps)

    def squared(self, x: fx.Node, at: Callable[[Point], Point], steps: int) -> bool | None:
        return self.square(x, at, steps) if x.args[1] == 2 else None

    def square(self, x: fx.Node, at: Callable[[Point], Point], steps: int) -> bool | None:
        """The square of a difference, if nothing else is multiplied."""
        base: Any = x.args[0]
        if op_name(base).rstrip("_") != "sub" or base.kwargs.get("alpha", 1) != 1 or self._written(base):
            return None
        if self._stopped(base):
            return None
        sides = base.args[:2]
        if self.factors or self.difference or not all(self.f.is_tensor(s) and not self._written(s) for s in sides):
            return None
        if at((probe := Index("p"),) * self.f.rank(x)) != (probe,) * self.f.rank(x):
            return None
        a, b = (self._side(s, self._broadcast(s, at)) for s in sides)
        self.difference = (a, b)
        return True

    def _side(self, x: fx.Node, at: Callable[[Point], Point]) -> Factor:
        """A factor read where it lies, less copies of it that broadcast it."""
        spread = spread_from(self.f, x)
        if spread is None or self._written(spread[0]):
            return Factor(x, at)
        return self._side(spread[0], lambda point: spread[1](at(point)))

    def outer(self, x: fx.Node, at: Callable[[Point], Point], steps: int) -> bool | None:
        """An einsum that sums over nothing."""
        equation: Any = x.args[0]
        factors: Any = x.args[1]
        *terms, out = spelled_out(equation, *(self.f.rank(y) for y in factors))
        if not all(len(set(t)) == len(t) and set(t) <= set(out) for t in terms):
            return None

        def reader(n: fx.Node, term: str) -> Callable[[Point], Point]:
            def read(point: Point) -> Point:
                where = dict(zip(out, at(point), strict=True))
                return broadcast(self.f, n, tuple(where[c] for c in term))

            return read

        return all(self.descend(n, reader(n, term), steps) for n, term in zip(factors, terms, strict=True))

    def _broadcast(self, x: Any, at: Callable[[Point], Point]) -> Callable[[Point], Point]:
        return (lambda point: broadcast(self.f, x, at(point))) if isinstance(x, fx.Node) else at


_PERMUTES = [t for t in VIEW_OPS if str(t).split(".")[1] in (
    "permute", "transpose", "contiguous", "clone", "unsqueeze", "movedim", "mT", "swapaxes")]  # fmt: skip
_SPREADS = [t for t in VIEW_OPS if str(t).split(".")[1] in ("expand", "expand_as", "broadcast_to", "repeat", "tile")]
_DOWN: dict[str, Callable[[_Search, fx.Node, Callable[[Point], Point], int], bool | None]] = {
    "mul": _Search.product, "multiply": _Search.product, "div": _Search.divided, "neg": _Search.negated,
    "to": _Search.cast, "_to_copy": _Search.cast, "pow": _Search.squared, "square": _Search.square,
    "einsum": _Search.outer, "detach": _Search.detached,
}  # fmt: skip


def spread_from(f: Facts, x: fx.Node) -> tuple[fx.Node, Callable[[Point], Point]] | None:
    """(source, where it is read) of what repeats a tensor along axes that this has not."""
    if x.target not in _SPREADS:
        return None
    ext: dict[Expr, Expr] = {Index(f"x{d}"): s for d, s in enumerate(f.shape(x))}
    moved = move(f, x, tuple(ext), ext)
    if moved is None or moved[1] != broadcast(f, moved[0], tuple(ext)):
        return None
    source = moved[0]
    return source, lambda point: broadcast(f, source, point)


def _is_computed(n: fx.Node) -> bool:
    return op_name(n).rstrip("_") in ("mul", "multiply", "div", "neg", "pow", "square", "einsum")


def _spans(x: Factor, point: Point) -> frozenset[Expr]:
    """The dimensions of what is summed that a factor has."""
    return frozenset[Expr]().union(*(free(y) for y in x.at(point)))


def _sides(f: Facts, factors: list[Factor], point: Point, when: int) -> tuple[Factor, Factor] | None:
    """Factors in two groups, each a tensor no larger than its largest: what only scales a side is multiplied with it.

    None for products of three tensors of which none is as wide as another."""
    groups: list[Factor] = []
    for x in sorted(factors, key=lambda x: -len(_spans(x, point))):
        wider = next((at for at, g in enumerate(groups) if _spans(x, point) <= _spans(g, point)), None)
        if len(groups) < 2 and (wider is None or len(factors) == 2):
            groups.append(x)
        elif wider is None or not all(broadcasts(f, y, point) for y in (x, groups[wider])):
            return None
        else:
            g = groups[wider]
            made = partial(f.make, aten.mul.Tensor, (g.node, x.node), when)
            whole = f.make_once(("scaled", g.node, x.node, when), made)
            groups[wider] = Factor(whole, partial(_spread, f, whole))
    return (groups[0], groups[1]) if len(groups) == 2 else None


def _spread(f: Facts, n: fx.Node, at: Point) -> Point:
    return broadcast(f, n, at)


def broadcasts(f: Facts, x: Factor, point: Point) -> bool:
    """Whether a factor is read as torch would broadcast it."""
    return x.at(point) == broadcast(f, x.node, point)
