"""Table: integers that are known when a program is made, one for each point of its axes.

    out[a..] = values[a..]

What a plan decides for each head of an attention is read from one, so that layers whose heads are decided differently
share their kernel. It reads a tensor only to lie on the same device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from attncc.ir.attention import Axis, Tensor
from attncc.ir.expr import Const, Size
from attncc.ir.interpret import Result
from attncc.ir.lines import Lines, declared_lines, tensor_lines
from attncc.ir.text import ParseError
from attncc.ir.verify import check_declarations, require

#: A table is written into the model's graph number by number.
MOST_VALUES = 1 << 16


@dataclass(frozen=True)
class Table:
    """Shapes: `out` is i64[*axes]; the extents are constants, `values` are in row-major order. `tensors` is the one
    tensor whose device the table lies on."""

    sizes: tuple[Size, ...]
    axes: tuple[Axis, ...]
    tensors: tuple[Tensor, ...]
    values: tuple[int, ...]

    @property
    def gives(self) -> tuple[Tensor, ...]:
        return (Tensor("out", "i64", tuple(x.extent for x in self.axes)),)


def verify_table(a: Table) -> Table:
    """`a` itself if it is well formed. Raises VerifyError otherwise."""
    check_declarations(a.axes, a.sizes, a.tensors, ())
    require(len(a.tensors) == 1, "it reads one tensor")
    extents = [int(x.extent.value) for x in a.axes if isinstance(x.extent, Const)]
    require(len(extents) == len(a.axes), "the extents of a table are constants")
    require(len(a.values) == prod(extents), f"{prod(extents)} points have {len(a.values)} values")
    require(len(a.values) <= MOST_VALUES, f"a table holds at most {MOST_VALUES} values")
    return a


def interpret_table(
    a: Table, tensors: Mapping[str, Any], sizes: Sequence[int] = (), *, compute: torch.dtype | None = None
) -> Result:
    """`out`, on the device of the tensor; `compute` is of no matter for integers."""
    shape = [int(x.extent.value) for x in a.axes if isinstance(x.extent, Const)]
    like = tensors[a.tensors[0].name]
    return {"out": like.new_tensor(list(a.values), dtype=torch.int64).reshape(shape)}


def print_table(a: Table) -> str:
    """The canonical text of `a`: `parse_table(print_table(a)) == a`."""
    lines = ["table", *declared_lines(a.sizes, (), a.axes), *tensor_lines(a.tensors)]
    return "\n".join([*lines, f"values {', '.join(map(str, a.values))}"]) + "\n"


def parse_table(text: str) -> Table:
    """The node that `text` describes. Raises ParseError on anything that is not canonical."""
    lines = Lines(text, "table")
    try:
        values = tuple(int(x) for x in lines.words("values"))
    except ValueError as error:
        raise ParseError("the values are integers") from error
    result = Table(lines.sizes, lines.axes.get("axis", ()), tuple(lines.tensors), values)
    lines.finish()
    return result
