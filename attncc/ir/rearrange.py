"""Rearrange: axes of a tensor grouped, permuted and summed over, in the notation of einops.

    (b h) i e -> b i (h e)          axes on the right that are missing are summed over

A group in parentheses is one dimension, counted through by its axes, the slowest first; `()` is a dimension of one.
Where the result's dimensions are no groups of axes, it is viewed in another shape at the end. The notation is that of
einops (Rogozhnikov, 2022), whose `rearrange` and `reduce` this is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch

from attncc.ir.affine import poly
from attncc.ir.attention import DTYPES, Axis, Tensor
from attncc.ir.build import ONE, mul
from attncc.ir.evaluate import int_value
from attncc.ir.expr import Expr, Size, free
from attncc.ir.interpret import Result, extent, size_table
from attncc.ir.lines import Lines, declared_lines, tensor_lines
from attncc.ir.text import ParseError, print_expr
from attncc.ir.verify import check_declarations, require

Dims = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Rearrange:
    """Shapes: `tensors[0]` has a dimension per group of `source`, `out` one per group of `target`, or the shape `view`
    where that is given. `memory` is the order in which the dimensions of `out` lie in memory, outermost first; as it
    comes where it is empty."""

    sizes: tuple[Size, ...]
    axes: tuple[Axis, ...]
    tensors: tuple[Tensor, ...]
    source: Dims
    target: Dims
    memory: tuple[int, ...] = ()
    view: tuple[Expr, ...] = ()

    def extent(self, name: str) -> Expr:
        return next(x.extent for x in self.axes if x.name == name)

    def shape(self, dims: Dims) -> tuple[Expr, ...]:
        return tuple(reduce(mul, (self.extent(n) for n in group), ONE) for group in dims)

    @property
    def summed(self) -> tuple[str, ...]:
        kept = {n for group in self.target for n in group}
        return tuple(n for group in self.source for n in group if n not in kept)

    @property
    def gives(self) -> tuple[Tensor, ...]:
        return (Tensor("out", self.tensors[0].dtype, self.view or self.shape(self.target)),)


def verify_rearrange(a: Rearrange) -> Rearrange:
    """`a` itself if it is well formed. Raises VerifyError otherwise."""
    check_declarations(a.axes, a.sizes, a.tensors, ())
    require(len(a.tensors) == 1, "it reads one tensor")
    declared = sorted(x.name for x in a.axes)
    require(sorted(n for g in a.source for n in g) == declared, "the source names each axis once")
    target = [n for g in a.target for n in g]
    require(len(set(target)) == len(target) and set(target) <= {*declared}, "the target names axes at most once")
    given, wanted = a.tensors[0].shape, a.shape(a.source)
    fits = len(given) == len(wanted) and all(poly(x) == poly(y) for x, y in zip(given, wanted, strict=True))
    require(fits, f"the tensor has the shape {list(given)}, the source {list(wanted)}")
    require(not a.summed or DTYPES[a.tensors[0].dtype][0] == "float", "what is summed over is a float")
    rank = len(a.view or a.target)
    require(not a.memory or sorted(a.memory) == list(range(rank)), "memory is a permutation of dimensions")
    sizes = frozenset[Expr](a.sizes)
    require(all(n.kind == "int" and free(n) <= sizes for n in a.view), "the view is integers over sizes")
    return a


def interpret_rearrange(
    a: Rearrange, tensors: Mapping[str, torch.Tensor], sizes: Sequence[int] = (), *, compute: torch.dtype | None = None
) -> Result:
    """`out`, in the dtype of the tensor (`compute` is the caller's tensors' own)."""
    table = size_table(a, sizes)
    extents = {x.name: extent(x.extent, table) for x in a.axes}

    def size_of(group: Sequence[str]) -> int:
        """The extent of a group; a single axis is itself, so that a trace sees no product."""
        return reduce(lambda x, y: x * y, (extents[n] for n in group)) if group else 1

    x = tensors[a.tensors[0].name]
    names = [n for group in a.source for n in group]
    if a.source != tuple((n,) for n in names):
        x = x.reshape([extents[n] for n in names])
    if a.summed:
        x = x.sum([names.index(n) for n in a.summed])
        names = [n for n in names if n not in a.summed]
    order = [names.index(n) for group in a.target for n in group]
    if order != list(range(len(order))):
        x = x.permute(order)
    if a.view:
        x = x.reshape([int_value(n, table) for n in a.view])
    elif a.target != tuple((names[n],) for n in order):
        x = x.reshape([size_of(group) for group in a.target])
    return {"out": in_memory(x, a.memory)}


def in_memory(x: torch.Tensor, memory: Sequence[int]) -> torch.Tensor:
    """A tensor whose dimensions lie in memory in the order `memory`; itself where that is empty."""
    if not memory:
        return x
    if list(memory) == list(range(len(memory))):
        return x.contiguous()
    return x.permute(list(memory)).contiguous().permute([list(memory).index(d) for d in range(len(memory))])


def _dims_text(dims: Dims) -> str:
    return " ".join(g[0] if len(g) == 1 else f"({' '.join(g)})" for g in dims)


_GROUP = re.compile(r"\(([^()]*)\)|(\w+)")


def _parse_dims(text: str) -> Dims:
    if _GROUP.sub("", text).strip():
        raise ParseError(f"groups of axes are `a (b c)`, not {text!r}")
    return tuple((m[2],) if m[2] else tuple(m[1].split()) for m in _GROUP.finditer(text))


def print_rearrange(a: Rearrange) -> str:
    """The canonical text of `a`: `parse_rearrange(print_rearrange(a)) == a`."""
    lines = ["rearrange", *declared_lines(a.sizes, (), a.axes), *tensor_lines(a.tensors)]
    lines.append(f"form   {_dims_text(a.source)} -> {_dims_text(a.target)}")
    if a.view:
        lines.append(f"view   {', '.join(map(print_expr, a.view))}")
    if a.memory:
        lines.append(f"memory {', '.join(map(str, a.memory))}")
    return "\n".join(lines) + "\n"


def parse_rearrange(text: str) -> Rearrange:
    """The node that `text` describes. Raises ParseError on anything that is not canonical."""
    lines = Lines(text, "rearrange")
    source, arrow, target = lines.take("form").partition("->")
    if not arrow:
        raise ParseError("the form is `source -> target`")
    memory = lines.words("memory")
    if not all(n.isdecimal() for n in memory):
        raise ParseError(f"memory is numbers of dimensions, not {', '.join(memory)!r}")
    view = tuple(lines.expr(n) for n in lines.words("view"))
    result = Rearrange(
        lines.sizes, lines.axes.get("axis", ()), tuple(lines.tensors), _parse_dims(source), _parse_dims(target),
        tuple(int(n) for n in memory), view,
    )  # fmt: skip
    lines.finish()
    return result
