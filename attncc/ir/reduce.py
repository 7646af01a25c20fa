"""Reduce: what the values over one axis come to, for each point of the others.

    out[a..] = op_x ( value(a.., x)  where  seen(a.., x) )    op: min, max, sum or mean; `none` where nothing is seen

The first key that a row may see, the number of keys that a sequence has, whether any key of a block is visible and the
mean of the keys of a block are all of this form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from attncc.ir.attention import Axis, Tensor
from attncc.ir.build import TRUE, ZERO
from attncc.ir.evaluate import DTYPE_OF, Evaluator
from attncc.ir.expr import Expr, Size, mentions
from attncc.ir.interpret import Result, extent, index_grid, size_table
from attncc.ir.lines import Lines, Writer, declared_lines, tensor_lines
from attncc.ir.verify import check_declarations, check_scope, require

Reduction = Literal["min", "max", "sum", "mean"]
REDUCTIONS: tuple[str, ...] = get_args(Reduction)
#: Points of a part of the first axis that are evaluated at once: no square of the length exists.
_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Reduce:
    """Shapes: `out` is (*axes), i64 where `value` is an integer, else f32. `over` is the axis that is reduced. `value`
    is an integer or a float, in a mean a float, `seen` a boolean, both over the axes, `over`, the sizes and loads;
    `none` is of the kind of `value`, over the axes and sizes, and is what a point gives that sees nothing."""

    sizes: tuple[Size, ...]
    axes: tuple[Axis, ...]
    over: Axis
    tensors: tuple[Tensor, ...]
    op: Reduction
    value: Expr
    seen: Expr = TRUE
    none: Expr = ZERO

    @property
    def dtype(self) -> str:
        return "i64" if self.value.kind == "int" else "f32"

    @property
    def gives(self) -> tuple[Tensor, ...]:
        return (Tensor("out", self.dtype, tuple(x.extent for x in self.axes)),)


def verify_reduce(a: Reduce) -> Reduce:
    """`a` itself if it is well formed. Raises VerifyError otherwise."""
    tensors = check_declarations((*a.axes, a.over), a.sizes, a.tensors, ())
    points = frozenset[Expr](x.index for x in a.axes) | frozenset[Expr](a.sizes)
    require(a.op in REDUCTIONS, f"an unknown reduction {a.op!r}")
    require(len(tensors) > 0, "it reads a tensor")
    require(a.value.kind in ("int", "float"), f"the value is a {a.value.kind}, not a number")
    require(a.op != "mean" or a.value.kind == "float", "a mean is of floats")
    require(a.seen.kind == "bool", f"seen is a {a.seen.kind}, not a bool")
    require(a.none.kind == a.value.kind, f"none is a {a.none.kind}, the value a {a.value.kind}")
    check_scope("value", a.value, tensors, points | {a.over.index})
    check_scope("seen", a.seen, tensors, points | {a.over.index})
    check_scope("none", a.none, tensors, points)
    return a


_REDUCE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "min": lambda x: x.amin(-1), "max": lambda x: x.amax(-1), "sum": lambda x: x.sum(-1), "mean": lambda x: x.sum(-1),
}  # fmt: skip


def interpret_reduce(
    a: Reduce, tensors: Mapping[str, torch.Tensor], sizes: Sequence[int] = (), *, compute: torch.dtype | None = None
) -> Result:
    """`out`. Floats are computed in `compute`, float32 where it is not given."""
    table = size_table(a, sizes)
    device = next(iter(tensors.values())).device
    axes = (*a.axes, a.over)
    shape = [extent(x.extent, table) for x in axes]
    grid = index_grid(axes, table, device)

    def part(at: slice | None) -> torch.Tensor:
        cut = {x: n[at] if at is not None and x is axes[0].index else n for x, n in grid.items()}
        whole = shape if at is None else [len(range(*at.indices(shape[0]))), *shape[1:]]
        ev = Evaluator(cut, tensors, compute or torch.float32, checked=True)
        value = ev(a.value).expand(whole)
        none = ev(a.none).expand([*whole[:-1], 1]).squeeze(-1)
        if type(whole[-1]) is int and whole[-1] == 0:
            return none
        if a.seen is TRUE:
            found = _REDUCE[a.op](value)
            return found / whole[-1] if a.op == "mean" else found
        seen = ev(a.seen)
        found = _REDUCE[a.op](torch.where(seen, value, torch.full_like(value, _neutral(a.op, value.dtype))))
        # counted over the axes alone that it depends on: not once more for every component of every head
        seen = seen if seen.ndim == len(whole) else seen.expand(whole)
        if a.op == "mean":
            count = seen.sum(-1) if mentions(a.seen, a.over.index) else seen.sum(-1) * whole[-1]
            found = found / count.clamp_min(1)
        return torch.where(seen.any(-1), found, none.to(found.dtype))

    return {"out": _in_parts(shape, part).to(compute if compute and a.dtype == "f32" else DTYPE_OF[a.dtype])}


def _neutral(reduction: Reduction, dtype: torch.dtype) -> float:
    """What changes nothing of a reduction."""
    info = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    return {"min": info.max, "max": info.min, "sum": 0, "mean": 0}[reduction]


def _in_parts(shape: Sequence[int], part: Callable[[slice | None], torch.Tensor]) -> torch.Tensor:
    """All points, in parts of the first axis where there are many; sizes that are symbols are taken whole."""
    known = len(shape) > 1 and all(type(n) is int for n in shape)
    rest = 1
    for n in shape[1:]:
        rest = rest * n
    if not known or shape[0] * rest <= _AT_ONCE:
        return part(None)
    step = max(1, _AT_ONCE // max(1, rest))
    return torch.cat([part(slice(first, first + step)) for first in range(0, shape[0], step)])


def print_reduce(a: Reduce) -> str:
    """The canonical text of `a`: `parse_reduce(print_reduce(a)) == a`."""
    roots = (a.value, a.seen, a.none)
    writer = Writer((x.name for x in (*a.axes, a.over, *a.sizes, *a.tensors)), roots)
    lines = ["reduce", *declared_lines(a.sizes, a.axes, (a.over,)), *tensor_lines(a.tensors), *writer.lets]
    lines += [f"op     {a.op}", f"value  {writer.show(a.value)}", f"seen   {writer.show(a.seen)}"]
    return "\n".join([*lines, f"none   {writer.show(a.none)}"]) + "\n"


def parse_reduce(text: str) -> Reduce:
    """The node that `text` describes. Raises ParseError on anything that is not canonical."""
    lines = Lines(text, "reduce", axes="x")
    (over,) = lines.axes["axis"]
    result = Reduce(
        lines.sizes, lines.axes["batch"], over, tuple(lines.tensors), lines.one_of("op", REDUCTIONS),
        lines.expr(lines.take("value")), lines.expr(lines.take("seen")), lines.expr(lines.take("none")),
    )  # fmt: skip
    lines.finish()
    return result
