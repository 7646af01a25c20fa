"""Scores: what a few rows give each of a few keys, as values: blocks of tokens by their summaries, or rows of a sample.

    s[b.., i, j]   = sum_d x(b.., i, d) * y(b.., j, d)
    out[b.., i, .] = norm_j( score(s; b.., i, j) where open(b.., i, j) )        norm: softmax, or none; 0 where not open

It is what an attention would weigh its values by, for extents of which the square is small: rules that choose the keys
of a large attention look at blocks of it, or at some of its rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from attncc.ir.analysis import blocks_of
from attncc.ir.attention import Axis, S, Tensor
from attncc.ir.build import TRUE
from attncc.ir.evaluate import Evaluator
from attncc.ir.expr import Const, Expr, Size, mentions
from attncc.ir.interpret import Result, extent, index_grid, size_table
from attncc.ir.lines import Lines, Writer, declared_lines, tensor_lines
from attncc.ir.verify import check_declarations, check_scope, require

Norm = Literal["softmax", "none"]
NORMS: tuple[str, ...] = get_args(Norm)


@dataclass(frozen=True)
class Scores:
    """Shapes: `out` is f32[*batch, i, j]. `x` and `y` are floats over the batch, their own row and d; `score` is a
    float of `s`, and `open` a boolean, over the batch, i and j; all of them over the sizes and loads too."""

    sizes: tuple[Size, ...]
    batch: tuple[Axis, ...]
    i: Axis
    j: Axis
    d: Axis
    tensors: tuple[Tensor, ...]
    x: Expr
    y: Expr
    score: Expr = S
    open: Expr = TRUE
    norm: Norm = "softmax"

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Those of the output."""
        return (*self.batch, self.i, self.j)

    @property
    def gives(self) -> tuple[Tensor, ...]:
        return (Tensor("out", "f32", tuple(x.extent for x in self.axes)),)

    def expressions(self) -> Iterator[Expr]:
        yield from (self.x, self.y, self.score, self.open)


def verify_scores(a: Scores) -> Scores:
    """`a` itself if it is well formed. Raises VerifyError otherwise."""
    tensors = check_declarations((*a.axes, a.d), a.sizes, a.tensors, ("s",))
    batch = frozenset[Expr](a.sizes) | frozenset[Expr](x.index for x in a.batch)
    both = batch | {a.i.index, a.j.index}
    for name, x, kind, allowed in (
        ("x", a.x, "float", batch | {a.i.index, a.d.index}), ("y", a.y, "float", batch | {a.j.index, a.d.index}),
        ("score", a.score, "float", both | {S}), ("open", a.open, "bool", both),
    ):  # fmt: skip
        require(x.kind == kind, f"{name} is a {x.kind}, not a {kind}")
        check_scope(name, x, tensors, allowed)
    require(len(tensors) > 0, "it reads a tensor")
    require(a.norm in NORMS, f"an unknown norm {a.norm!r}")
    return a


def interpret_scores(
    a: Scores, tensors: Mapping[str, torch.Tensor], sizes: Sequence[int] = (), *, compute: torch.dtype | None = None
) -> Result:
    """`out`, computed in `compute`, float32 where it is not given. What is chosen by it has no gradient."""
    table = size_table(a, sizes)
    wide = compute or torch.float32
    device = next(iter(tensors.values())).device
    read = {name: x.detach() for name, x in tensors.items()}
    shape = [extent(x.extent, table) for x in a.axes]

    def operand(value: Expr, axes: Sequence[Axis]) -> torch.Tensor:
        ev = Evaluator(index_grid(axes, table, device), read, wide, checked=True)
        return ev(value).to(wide).expand([extent(x.extent, table) for x in axes])

    groups, y = _grouped(a)
    x = operand(a.x, (*a.batch, a.i, a.d))
    keys = operand(y, (*groups, a.j, a.d))
    folded = x.reshape(*[extent(n.extent, table) for n in groups], -1, extent(a.d.extent, table))
    s = (folded @ keys.transpose(-1, -2)).reshape(shape)
    ev = Evaluator(index_grid(a.axes, table, device), read, wide, checked=True)
    ev.known[S] = s
    score, seen = ev(a.score).expand(shape), ev(a.open).expand(shape)
    if a.norm == "none":
        return {"out": torch.where(seen, score, 0.0)}
    p = torch.softmax(score.masked_fill(~seen, torch.finfo(wide).min), -1)
    return {"out": torch.where(seen, p, 0.0)}


def _grouped(a: Scores) -> tuple[tuple[Axis, ...], Expr]:
    """The batch axes over which the keys differ, and `y` over those: heads of one group read the same keys once."""
    if not a.batch:
        return (), a.y
    *outer, last = a.batch
    if not isinstance(last.extent, Const):
        return a.batch, a.y
    heads = int(last.extent.value)
    found = blocks_of(a.y, last.index) if mentions(a.y, last.index) else (a.y, heads)
    if found is None or heads % found[1]:
        return a.batch, a.y
    y, size = found
    return (*outer, Axis(last.name, Const(heads // size))), y


def print_scores(a: Scores) -> str:
    """The canonical text of `a`: `parse_scores(print_scores(a)) == a`."""
    writer = Writer((x.name for x in (*a.axes, a.d, *a.sizes, *a.tensors)), a.expressions())
    lines = ["scores", *declared_lines(a.sizes, a.batch, (a.i, a.j, a.d)), *tensor_lines(a.tensors), *writer.lets]
    lines += [f"x      {writer.show(a.x)}", f"y      {writer.show(a.y)}", f"score  {writer.show(a.score)}"]
    return "\n".join([*lines, f"open   {writer.show(a.open)}", f"norm   {a.norm}"]) + "\n"


def parse_scores(text: str) -> Scores:
    """The node that `text` describes. Raises ParseError on anything that is not canonical."""
    lines = Lines(text, "scores", (S,), axes="ijd")
    i, j, d = lines.axes["axis"]
    x, y, score, seen = (lines.expr(lines.take(word)) for word in ("x", "y", "score", "open"))
    result = Scores(
        lines.sizes, lines.axes["batch"], i, j, d, tuple(lines.tensors), x, y, score, seen, lines.one_of("norm", NORMS)
    )
    lines.finish()
    return result
