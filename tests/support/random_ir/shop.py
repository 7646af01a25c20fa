"""What a random program is made from: choices, named sizes, and tensors in every memory layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from hypothesis import strategies as st

from attncc.ir import Expr, Index, Load, Size, Tensor
from attncc.ir.attention import DTYPES
from attncc.ir.build import add, const, mul, sub
from attncc.ir.evaluate import DTYPE_OF

T = TypeVar("T")


@dataclass(frozen=True)
class Dim:
    """An extent as the program writes it, and its value."""

    expr: Expr
    value: int


def const_dim(n: int) -> Dim:
    return Dim(const(n), n)


def plus(a: Dim, b: Dim) -> Dim:
    return Dim(add(a.expr, b.expr), a.value + b.value)


def minus(a: Dim, b: Dim) -> Dim:
    return Dim(sub(a.expr, b.expr), a.value - b.value)


def times(a: Dim, b: Dim) -> Dim:
    return Dim(mul(a.expr, b.expr), a.value * b.value)


class Shop:
    """Draws choices, and keeps what was declared on the way."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.sizes: dict[Size, int] = {}
        self.declared: list[Tensor] = []
        self.tensors: dict[str, torch.Tensor] = {}
        self.extents: dict[str, Dim] = {}
        self.random = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def pick(self, *options: T) -> T:
        return self.draw(st.sampled_from(options))

    def integer(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def some(self, options: Sequence[T], most: int) -> list[T]:
        return self.draw(st.lists(st.sampled_from(options), max_size=most, unique=True))

    def order(self, xs: Sequence[T]) -> tuple[T, ...]:
        return tuple(self.draw(st.permutations(list(xs)))) if self.pick(False, True) else tuple(xs)

    def length(self, name: str, longest: int) -> Dim:
        """A sequence length: a constant, or a size known at the call."""
        n = self.integer(1, longest)
        return self.size(name, n) if self.pick(False, True) else const_dim(n)

    def size(self, name: str, value: int) -> Dim:
        self.sizes[Size(name)] = value
        return Dim(Size(name), value)

    def fresh(self, name: str) -> str:
        taken = {t.name for t in self.declared}
        return next(n for count in range(100) if (n := f"{name}{count or ''}") not in taken)

    def has(self, axis: str) -> bool:
        return axis in self.extents

    def batch_axes(self) -> list[str]:
        """A random choice of the batch axes."""
        return [x for x in self.extents if x not in ("i", "j", "d", "e") and self.pick(True, False)]

    def floats(self, name: str, dtype: str, dims: Sequence[Dim], scale: float = 1.0) -> str:
        """Declare a tensor of normal numbers; its name."""
        return self._declare(
            name, dtype, dims, lambda shape: scale * torch.randn(shape, generator=self.random, dtype=torch.float64)
        )

    def integers(self, name: str, dtype: str, dims: Sequence[Dim], low: int, high: int) -> str:
        """Declare a tensor of integers low <= x <= high; its name."""
        return self._declare(
            name, dtype, dims, lambda shape: torch.randint(low, high + 1, shape, generator=self.random)
        )

    def load(self, name: str, axes: Sequence[str], dtype: str, low: int = 0, high: int = 1) -> Load:
        """A load at the indices of `axes`, from a new tensor."""
        name = self.fresh(name)
        dims = [self.extents[x] for x in axes]
        kind = DTYPES[dtype][0]
        if kind == "float":
            self.floats(name, dtype, dims)
        else:
            self.integers(name, dtype, dims, low, high)
        return Load(name, tuple(Index(x) for x in axes), kind)

    def _declare(
        self, name: str, dtype: str, dims: Sequence[Dim], values: Callable[[list[int]], torch.Tensor]
    ) -> str:
        shape = [d.value for d in dims]
        self.tensors[name] = self._stored(shape, lambda n: values(n).to(DTYPE_OF[dtype]))
        self.declared.append(Tensor(name, dtype, tuple(d.expr for d in dims)))
        return name

    def _stored(self, shape: list[int], values: Callable[[list[int]], torch.Tensor]) -> torch.Tensor:
        """A tensor of this shape lying in memory in one of the ways models leave them."""
        how = self.pick("contiguous", "permuted", "sliced", "expanded") if shape else "contiguous"
        at = self.integer(0, len(shape) - 1) if shape else 0
        if how == "permuted":
            order = list(self.draw(st.permutations(range(len(shape)))))
            back = [order.index(n) for n in range(len(shape))]
            return values([shape[n] for n in order]).permute(back)
        if how == "sliced":
            longer = [2 * n + 1 if d == at else n for d, n in enumerate(shape)]
            return values(longer).narrow(at, 1, 2 * shape[at]).unfold(at, 1, 2).squeeze(-1)
        if how == "expanded":
            return values([1 if d == at else n for d, n in enumerate(shape)]).expand(shape)
        return values(shape)
