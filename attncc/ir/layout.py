"""Layout: tokens in another order, and back.

    out[.., t, ..] = x[.., source(t), ..]             or, where `inverse`,       out[.., source(t), ..] = x[.., t, ..]

`source` is a bijection on the tokens: a formula (tiles, patches, frame, height and width in another order, a curve) or
a load from a permutation that the model or a policy computed (clusters, a stable sort). One node after its inverse is
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from attncc.ir.attention import Axis, Tensor
from attncc.ir.evaluate import Evaluator
from attncc.ir.expr import Const, Expr, Size, loads
from attncc.ir.interpret import Result, extent, index_grid, size_table
from attncc.ir.lines import Lines, Writer, declared_lines, tensor_lines
from attncc.ir.text import ParseError
from attncc.ir.verify import check_declarations, check_scope, require

#: Formulas over at most this many tokens are checked to be bijections when a node is verified.
MOST_CHECKED = 1 << 16


@dataclass(frozen=True)
class Layout:
    """Shapes: `tensors[0]` and `out` are (*axes); the other tensors are what `source` reads. `along` is the axis of the
    tokens; `source` may mention it, and the axes before it."""

    sizes: tuple[Size, ...]
    axes: tuple[Axis, ...]
    tensors: tuple[Tensor, ...]
    along: str
    source: Expr
    inverse: bool = False

    @property
    def place(self) -> int:
        return [x.name for x in self.axes].index(self.along)

    @property
    def gives(self) -> tuple[Tensor, ...]:
        return (Tensor("out", self.tensors[0].dtype, tuple(x.extent for x in self.axes)),)


def verify_layout(a: Layout) -> Layout:
    """`a` itself if it is well formed. Raises VerifyError otherwise."""
    tensors = check_declarations(a.axes, a.sizes, a.tensors, ())
    require(len(a.tensors) > 0, "it reads a tensor")
    require(a.along in {x.name for x in a.axes}, f"it has no axis {a.along}")
    require(a.tensors[0].shape == tuple(x.extent for x in a.axes), "its tensor has a dimension per axis")
    require(a.source.kind == "int", f"the source is a {a.source.kind}, not an integer")
    known = frozenset[Expr](x.index for x in a.axes[: a.place + 1]) | frozenset[Expr](a.sizes)
    check_scope("source", a.source, tensors, known)
    read = [t.name for t in a.tensors[1:]]
    require({x.tensor for x in loads(a.source)} == {*read}, "the source reads the tensors after the first, no others")
    tokens = a.axes[a.place]
    if not read and not a.sizes and isinstance(tokens.extent, Const) and int(tokens.extent.value) <= MOST_CHECKED:
        at = _source(a, {}, {}, torch.device("cpu")).expand([extent(x.extent, {}) for x in a.axes[: a.place + 1]])
        every = torch.arange(int(tokens.extent.value)).expand(at.shape)
        require(bool((at.sort(-1).values == every).all()), "the source is no bijection on the tokens")
    return a


def interpret_layout(
    a: Layout, tensors: Mapping[str, torch.Tensor], sizes: Sequence[int] = (), *, compute: torch.dtype | None = None
) -> Result:
    """`out`, in the dtype of the tensor."""
    table = size_table(a, sizes)
    x = tensors[a.tensors[0].name]
    at = _source(a, tensors, table, x.device)
    if a.inverse:
        at = at.expand([extent(n.extent, table) for n in a.axes[: a.place + 1]]).argsort(-1)
    at = at.reshape(at.shape + (1,) * (len(a.axes) - a.place - 1))
    return {"out": torch.gather(x, a.place, at.expand(x.shape))}


def _source(
    a: Layout, tensors: Mapping[str, torch.Tensor], table: Mapping[Expr, int], device: torch.device
) -> torch.Tensor:
    """The source over the axes up to that of the tokens, of extent 1 where it does not depend on one."""
    axes = a.axes[: a.place + 1]
    ev = Evaluator(index_grid(axes, table, device), tensors, torch.float32)
    return ev(a.source)


def print_layout(a: Layout) -> str:
    """The canonical text of `a`: `parse_layout(print_layout(a)) == a`."""
    writer = Writer((x.name for x in (*a.axes, *a.sizes, *a.tensors)), (a.source,))
    lines = ["layout", *declared_lines(a.sizes, (), a.axes), *tensor_lines(a.tensors), *writer.lets]
    lines += [f"along  {a.along}", f"source {writer.show(a.source)}"]
    return "\n".join([*lines, *(["inverse"] if a.inverse else [])]) + "\n"


def parse_layout(text: str) -> Layout:
    """The node that `text` describes. Raises ParseError on anything that is not canonical."""
    lines = Lines(text, "layout")
    along = lines.take("along")
    source = lines.expr(lines.take("source"))
    inverse = lines.field.pop("inverse", None)
    if inverse:
        raise ParseError(f"the line 'inverse' has no words, not {inverse!r}")
    result = Layout(lines.sizes, lines.axes.get("axis", ()), tuple(lines.tensors), along, source, inverse is not None)
    lines.finish()
    return result
