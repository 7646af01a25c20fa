"""Correct: an output changed element by element, by what other tensors hold for its row or element.

    out[r.., e] = value(x[r.., e], u[r..], v[r.., e], ...)

A row scale and a pooled rest (`x * u + v`), the identity blend `(1 - u) x + u v`, an output gate, the logarithm of a
sum in another base, and a cast are all of this form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from attncc.ir.attention import DTYPES, Axis, Tensor
from attncc.ir.evaluate import DTYPE_OF
from attncc.ir.expr import Expr, Load, Size, loads
from attncc.ir.interpret import Result, extent, index_grid, size_table
from attncc.ir.lines import Lines, Writer, declared_lines, tensor_lines
from attncc.ir.verify import check_declarations, check_scope, require
from attncc.ir.views import is_view, over_axes


@dataclass(frozen=True)
class Correct:
    """Shapes: `out` is (*axes), in `dtype`. `value` is a float expression over the axes, the sizes and loads; it is
    computed in float64 if a tensor is, else in float32."""

    sizes: tuple[Size, ...]
    axes: tuple[Axis, ...]
    tensors: tuple[Tensor, ...]
    value: Expr
    dtype: str = "f32"

    @property
    def gives(self) -> tuple[Tensor, ...]:
        return (Tensor("out", self.dtype, tuple(x.extent for x in self.axes)),)

    @property
    def compute_dtype(self) -> str:
        return "f64" if any(t.dtype == "f64" for t in self.tensors) else "f32"

    @property
    def all_views(self) -> bool:
        """Whether every index and size is reached by loads that are views, so that no index has to be made."""
        return _leaves(self.value, self.axes) == frozenset()


def _leaves(root: Expr, axes: Sequence[Axis]) -> frozenset[Expr]:
    """The leaves of an expression that are not inside of loads that are views."""
    if isinstance(root, Load) and is_view(root, axes):
        return frozenset()
    if root.children:
        return frozenset[Expr]().union(*(_leaves(c, axes) for c in root.children))
    return frozenset([root]) if isinstance(root, Size) or root in {x.index for x in axes} else frozenset()


def verify_correct(a: Correct) -> Correct:
    """`a` itself if it is well formed. Raises VerifyError otherwise."""
    tensors = check_declarations(a.axes, a.sizes, a.tensors, ())
    require(len(tensors) > 0, "it reads a tensor")
    require(a.value.kind == "float", f"the value is a {a.value.kind}, not a float")
    check_scope("value", a.value, tensors, frozenset[Expr](x.index for x in a.axes) | frozenset(a.sizes))
    require({x.tensor for x in loads(a.value)} == {*tensors}, "the value reads each tensor")
    require(a.dtype in DTYPES and DTYPES[a.dtype][0] == "float", f"dtype {a.dtype} is no float type")
    return a


def interpret_correct(
    a: Correct, tensors: Mapping[str, torch.Tensor], sizes: Sequence[int] = (), *, compute: torch.dtype | None = None
) -> Result:
    """`out`; in `compute` where it is given, else in the node's own dtype."""
    table = size_table(a, sizes)
    wide = compute or DTYPE_OF[a.compute_dtype]
    grid = {} if a.all_views else index_grid(a.axes, table, next(iter(tensors.values())).device)
    value = over_axes(a.value, a.axes, tensors, wide, grid, {t.name: t.shape for t in a.tensors})
    shape = [extent(x.extent, table) for x in a.axes]
    return {"out": value.expand(shape).to(compute or DTYPE_OF[a.dtype])}


def print_correct(a: Correct) -> str:
    """The canonical text of `a`: `parse_correct(print_correct(a)) == a`."""
    writer = Writer((x.name for x in (*a.axes, *a.sizes, *a.tensors)), (a.value,))
    lines = ["correct", *declared_lines(a.sizes, (), a.axes), *tensor_lines(a.tensors), *writer.lets]
    return "\n".join([*lines, f"value  {writer.show(a.value)}", f"dtype  {a.dtype}"]) + "\n"


def parse_correct(text: str) -> Correct:
    """The node that `text` describes. Raises ParseError on anything that is not canonical."""
    lines = Lines(text, "correct")
    result = Correct(
        lines.sizes, lines.axes.get("axis", ()), tuple(lines.tensors), lines.expr(lines.take("value")),
        lines.one_of("dtype", tuple(DTYPES)),
    )  # fmt: skip
    lines.finish()
    return result
