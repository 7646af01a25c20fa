"""Order: tokens sorted by the cluster that each is nearest to, those of one cluster as they were.

    c_0            = `count` tokens, evenly spread
    near_r(t)      = the first of the centres c_r at the least distance from x[t]
    c_r+1          = the mean of the tokens near each centre; the centre itself where there is none
    out[a.., p]    = the p-th token in a stable sort by near(t) after `rounds` means                       (k-means)

Tokens that are not `there` come last. Sorts that are not stable, as published code has them, give other groups on other
machines.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from attncc.ir.attention import Axis, Tensor
from attncc.ir.build import TRUE
from attncc.ir.evaluate import Evaluator
from attncc.ir.expr import Expr, Size
from attncc.ir.interpret import Result, extent, index_grid, size_table
from attncc.ir.lines import Lines, Writer, declared_lines, tensor_lines
from attncc.ir.text import ParseError
from attncc.ir.verify import check_declarations, check_scope, require


@dataclass(frozen=True)
class Order:
    """Shapes: `out` is i64[*batch, t]. `value` is a float over the batch, `t`, `d`, the sizes and loads, `there` a
    boolean over all of those but `d`."""

    sizes: tuple[Size, ...]
    batch: tuple[Axis, ...]
    t: Axis
    d: Axis
    tensors: tuple[Tensor, ...]
    value: Expr
    count: int
    rounds: int = 1
    there: Expr = TRUE

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Those of the output."""
        return (*self.batch, self.t)

    @property
    def gives(self) -> tuple[Tensor, ...]:
        return (Tensor("out", "i64", tuple(x.extent for x in self.axes)),)

    def expressions(self) -> Iterator[Expr]:
        yield from (self.value, self.there)


def verify_order(a: Order) -> Order:
    """`a` itself if it is well formed. Raises VerifyError otherwise."""
    tensors = check_declarations((*a.axes, a.d), a.sizes, a.tensors, ())
    points = frozenset[Expr](a.sizes) | frozenset[Expr](x.index for x in a.axes)
    require(len(tensors) > 0, "it reads a tensor")
    require(a.value.kind == "float", f"the value is a {a.value.kind}, not a float")
    require(a.there.kind == "bool", f"there is a {a.there.kind}, not a bool")
    check_scope("value", a.value, tensors, points | {a.d.index})
    check_scope("there", a.there, tensors, points)
    require(a.count >= 1 and a.rounds >= 0, "there is at least 1 cluster, and no fewer rounds than none")
    return a


def interpret_order(
    a: Order, tensors: Mapping[str, torch.Tensor], sizes: Sequence[int] = (), *, compute: torch.dtype | None = None
) -> Result:
    """`out`, from values in `compute`, float32 where it is not given. What is sorted by it has no gradient."""
    table = size_table(a, sizes)
    wide = compute or torch.float32
    device = next(iter(tensors.values())).device
    read = {name: x.detach() for name, x in tensors.items()}
    shape = [extent(x.extent, table) for x in (*a.axes, a.d)]
    x = Evaluator(index_grid((*a.axes, a.d), table, device), read, wide, checked=True)(a.value).to(wide).expand(shape)
    there = Evaluator(index_grid(a.axes, table, device), read, wide, checked=True)(a.there).expand(shape[:-1])
    n, numbers = shape[-2], torch.arange(a.count, device=device)
    centres = x.index_select(-2, numbers * n // a.count)
    for _ in range(a.rounds):
        near = (_nearest(x, centres)[..., None] == numbers) & there[..., None]
        held = near.sum(-2)[..., None]
        means = near.to(wide).transpose(-1, -2) @ x / held.clamp_min(1)
        centres = torch.where(held > 0, means, centres)
    cluster = torch.where(there, _nearest(x, centres), a.count)
    return {"out": torch.sort(cluster, dim=-1, stable=True).indices}


def _nearest(x: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """The number of the centre that each token is nearest to."""
    apart = centres.square().sum(-1)[..., None, :] - 2 * (x @ centres.transpose(-1, -2))
    return apart.argmin(-1)


def print_order(a: Order) -> str:
    """The canonical text of `a`: `parse_order(print_order(a)) == a`."""
    writer = Writer((x.name for x in (*a.axes, a.d, *a.sizes, *a.tensors)), a.expressions())
    lines = ["order", *declared_lines(a.sizes, a.batch, (a.t, a.d)), *tensor_lines(a.tensors), *writer.lets]
    lines += [f"value  {writer.show(a.value)}", f"there  {writer.show(a.there)}", f"over   {a.count}"]
    return "\n".join([*lines, f"rounds {a.rounds}"]) + "\n"


def parse_order(text: str) -> Order:
    """The node that `text` describes. Raises ParseError on anything that is not canonical."""
    lines = Lines(text, "order")
    axes = lines.axes.get("axis", ())
    if len(axes) != 2:
        raise ParseError("an order has the axes of the tokens and of their components")
    value, there = (lines.expr(lines.take(word)) for word in ("value", "there"))
    count, rounds = (lines.take(word) for word in ("over", "rounds"))
    if not (count.isdecimal() and rounds.isdecimal()):
        raise ParseError("clusters and rounds are numbers")
    result = Order(
        lines.sizes, lines.axes["batch"], axes[0], axes[1], tuple(lines.tensors), value, int(count), int(rounds), there
    )
    lines.finish()
    return result
