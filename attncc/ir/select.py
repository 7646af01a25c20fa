"""Select: which points are taken by what they are worth, such as the blocks of keys that a block of rows attends to.

    out[a.., x..] = open(a.., x..) and x.. is among those that `take` takes of the points of a.. that are open

Points are taken in the order of `value`, those of `first` before all others, the lower point first where values are
equal, so that two runs and two tilings agree. At least one open point is taken. How much is taken is told as published
rules tell it:

    count      the first `amount` points                                            (top-k)
    fraction   the share `amount` of the open points, rounded up
    mass       the fewest points that hold the share `amount` of all values, the one that crosses it included
    least      the points whose value is at least `amount`
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from attncc.ir.attention import Axis, Tensor
from attncc.ir.build import FALSE, ONE, TRUE
from attncc.ir.evaluate import Evaluator
from attncc.ir.expr import Const, Expr, Size
from attncc.ir.interpret import Result, extent, index_grid, size_table
from attncc.ir.lines import Lines, Writer, declared_lines, tensor_lines
from attncc.ir.verify import check_declarations, check_scope, require

Take = Literal["count", "fraction", "mass", "least"]
TAKES: tuple[str, ...] = get_args(Take)
#: A share of a count is rounded up, but not by what rounding put on it.
_SLACK = 1e-6


@dataclass(frozen=True)
class Select:
    """Shapes: `out` is bool[*batch, *over]. `value` is a float, `open` and `first` booleans, over `batch`, `over`, the
    sizes and loads; `amount` is a number over `batch`, the sizes and loads."""

    sizes: tuple[Size, ...]
    batch: tuple[Axis, ...]
    over: tuple[Axis, ...]
    tensors: tuple[Tensor, ...]
    value: Expr
    take: Take = "count"
    amount: Expr = ONE
    open: Expr = TRUE
    first: Expr = FALSE

    @property
    def axes(self) -> tuple[Axis, ...]:
        return (*self.batch, *self.over)

    @property
    def gives(self) -> tuple[Tensor, ...]:
        return (Tensor("out", "bool", tuple(x.extent for x in self.axes)),)

    def expressions(self) -> Iterator[Expr]:
        yield from (self.value, self.amount, self.open, self.first)


def verify_select(a: Select) -> Select:
    """`a` itself if it is well formed. Raises VerifyError otherwise."""
    tensors = check_declarations(a.axes, a.sizes, a.tensors, ())
    points = frozenset[Expr](a.sizes) | frozenset[Expr](x.index for x in a.axes)
    require(len(a.over) > 0, "it selects over an axis")
    require(len(tensors) > 0, "it reads a tensor")
    require(a.take in TAKES, f"an unknown way to take: {a.take!r}")
    for name, x, kind in (("value", a.value, "float"), ("open", a.open, "bool"), ("first", a.first, "bool")):
        require(x.kind == kind, f"{name} is a {x.kind}, not a {kind}")
        check_scope(name, x, tensors, points)
    require(a.amount.kind in ("int", "float"), f"the amount is a {a.amount.kind}, not a number")
    check_scope("amount", a.amount, tensors, points - {x.index for x in a.over})
    return a


def interpret_select(
    a: Select, tensors: Mapping[str, torch.Tensor], sizes: Sequence[int] = (), *, compute: torch.dtype | None = None
) -> Result:
    """`out`, from values in `compute`, float32 where it is not given."""
    table = size_table(a, sizes)
    wide = compute or torch.float32
    device = next(iter(tensors.values())).device
    read = {name: x.detach() for name, x in tensors.items()}
    shape = [extent(x.extent, table) for x in a.axes]
    rank, at = len(a.batch), len(a.over)
    ev = Evaluator(index_grid(a.axes, table, device), read, wide, checked=True)

    def points(x: Expr) -> torch.Tensor:
        return ev(x).expand(shape).flatten(rank)

    value, seen = points(a.value).to(wide), points(a.open)
    if a.take == "count" and isinstance(a.amount, Const) and type(value.shape[-1]) is int:
        return {"out": _first(value, seen, points(a.first), int(a.amount.value)).reshape(shape)}
    if a.take == "fraction" and isinstance(a.amount, Const) and a.amount.value >= 1:
        return {"out": seen.reshape(shape)}
    amount = ev(a.amount).expand([*shape[:rank], *[1] * at]).flatten(rank)
    ranked = value.masked_fill(points(a.first), float("inf")).masked_fill(~seen, float("-inf"))
    order = torch.sort(ranked, dim=-1, descending=True, stable=True).indices
    place = torch.arange(order.shape[-1], device=device)
    count = seen.sum(-1, keepdim=True)
    taken = _taken(a, value, seen, order, place, count, amount)
    taken = (taken | (place == 0)) & (place < count)
    return {"out": torch.zeros_like(seen).scatter(-1, order, taken).reshape(shape)}


def _first(value: torch.Tensor, seen: torch.Tensor, first: torch.Tensor, count: int) -> torch.Tensor:
    """Which `count` points are taken, at least one, without an order of all: those above the least of them, and of
    equals to that the lower ones."""
    infinite = float("inf")
    ranked = torch.where(first | value.isnan(), infinite, value).masked_fill(~seen, -infinite)
    most = ranked.topk(min(max(count, 1), ranked.shape[-1]), dim=-1).values
    least = most[..., -1:]
    above = ranked > least
    equal = ranked == least
    left = most.shape[-1] - above.sum(-1, keepdim=True)
    return (above | (equal & (equal.cumsum(-1) <= left))) & seen


def _taken(
    a: Select, value: torch.Tensor, seen: torch.Tensor, order: torch.Tensor, place: torch.Tensor, count: torch.Tensor,
    amount: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Which places of the order are taken, of those that are open."""
    if a.take == "count":
        return place < amount
    if a.take == "fraction":
        return place < torch.ceil(count * amount.to(torch.float64) - _SLACK)
    if a.take == "least":
        return value.gather(-1, order) >= amount
    mass = value.masked_fill(~seen, 0.0).gather(-1, order)
    share = mass / mass.sum(-1, keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)
    return (share.cumsum(-1) - share < amount) | (amount >= 1)


def print_select(a: Select) -> str:
    """The canonical text of `a`: `parse_select(print_select(a)) == a`."""
    writer = Writer((x.name for x in (*a.axes, *a.sizes, *a.tensors)), a.expressions())
    lines = ["select", *declared_lines(a.sizes, a.batch, a.over), *tensor_lines(a.tensors), *writer.lets]
    lines += [f"value  {writer.show(a.value)}", f"take   {a.take}", f"amount {writer.show(a.amount)}"]
    return "\n".join([*lines, f"open   {writer.show(a.open)}", f"first  {writer.show(a.first)}"]) + "\n"


def parse_select(text: str) -> Select:
    """The node that `text` describes. Raises ParseError on anything that is not canonical."""
    lines = Lines(text, "select")
    over = lines.axes.get("axis", ())
    value, amount, seen, first = (lines.expr(lines.take(word)) for word in ("value", "amount", "open", "first"))
    result = Select(
        lines.sizes, lines.axes["batch"], over, tuple(lines.tensors), value, lines.one_of("take", TAKES), amount, seen,
        first,
    )  # fmt: skip
    lines.finish()
    return result
