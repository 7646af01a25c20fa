"""Nodes: what a program is made of. A node is a frozen value that declares the tensors it reads and those it gives.

What it means is its interpreter, in plain traceable torch, so that it runs everywhere before it has a kernel anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from attncc.ir.attention import Attention, Axis, Tensor
from attncc.ir.attention_text import parse_attention, print_attention
from attncc.ir.boxes import Boxes, interpret_boxes, parse_boxes, print_boxes, verify_boxes
from attncc.ir.correct import Correct, interpret_correct, parse_correct, print_correct, verify_correct
from attncc.ir.evaluate import DTYPE_OF
from attncc.ir.expr import Expr, Size
from attncc.ir.interpret import Result, interpret
from attncc.ir.interpret_linear import interpret_linear
from attncc.ir.layout import Layout, interpret_layout, parse_layout, print_layout, verify_layout
from attncc.ir.linear import Linear, parse_linear, print_linear
from attncc.ir.linear_chunks import by_chunks, unchunked
from attncc.ir.merge import Merge, interpret_merge, parse_merge, print_merge, verify_merge
from attncc.ir.order import Order, interpret_order, parse_order, print_order, verify_order
from attncc.ir.rearrange import Rearrange, interpret_rearrange, parse_rearrange, print_rearrange, verify_rearrange
from attncc.ir.reduce import Reduce, interpret_reduce, parse_reduce, print_reduce, verify_reduce
from attncc.ir.scores import Scores, interpret_scores, parse_scores, print_scores, verify_scores
from attncc.ir.select import Select, interpret_select, parse_select, print_select, verify_select
from attncc.ir.table import Table, interpret_table, parse_table, print_table, verify_table
from attncc.ir.verify import verify
from attncc.ir.verify_linear import verify_linear


class Node(Protocol):
    """What every node declares: the integers a call passes, and the tensors that it reads."""

    @property
    def sizes(self) -> tuple[Size, ...]: ...

    @property
    def tensors(self) -> tuple[Tensor, ...]: ...


@dataclass(frozen=True)
class Kind:
    """One kind of node. `title` is the first line of its text; `interpret(node, tensors by name, sizes, compute=None)`
    gives its outputs by name."""

    title: str
    type: type
    gives: Callable[[Any], tuple[Tensor, ...]]
    verify: Callable[[Any], Any]
    interpret: Callable[..., Result]
    print: Callable[[Any], str]
    parse: Callable[[str], Any]


def _of_attention(a: Attention) -> tuple[Tensor, ...]:
    axes = {"out": a.out_axes, "lse": (*a.batch, a.i), "weights": (*a.batch, a.i, a.j)}
    return _outputs(axes, a.outputs, {"lse": a.compute_dtype}, a.dtype)


def _of_linear(a: Linear) -> tuple[Tensor, ...]:
    axes = {"out": (*a.batch, a.i, a.e), "state": (*a.batch, a.d, a.e)}
    return _outputs(axes, a.outputs, {"state": a.compute_dtype}, a.dtype)


def _outputs(
    axes: Mapping[str, tuple[Axis, ...]], names: Sequence[str], dtypes: Mapping[str, str], dtype: str
) -> tuple[Tensor, ...]:
    shapes: dict[str, tuple[Expr, ...]] = {n: tuple(x.extent for x in axes[n]) for n in names}
    return tuple(Tensor(n, dtypes.get(n, dtype), shapes[n]) for n in names)


def _linear(
    a: Linear, tensors: Mapping[str, torch.Tensor], sizes: Sequence[int] = (), *, compute: torch.dtype | None = None
) -> Result:
    """With `compute` step by step, as the oracle; without, by chunks where that can be: it is what a graph runs."""
    wide = DTYPE_OF[a.compute_dtype]
    if compute is None and unchunked(a) is None:
        found = by_chunks(a, tensors, sizes, compute=wide)
    else:
        found = interpret_linear(a, tensors, sizes, compute=compute or wide)
    return found if compute else {t.name: found[t.name].to(DTYPE_OF[t.dtype]) for t in _of_linear(a)}


def _own(
    a: Merge | Correct | Layout | Order | Rearrange | Scores | Select | Reduce | Table | Boxes,
) -> tuple[Tensor, ...]:
    return a.gives


KINDS = (
    Kind("attention", Attention, _of_attention, verify, interpret, print_attention, parse_attention),
    Kind("linear", Linear, _of_linear, verify_linear, _linear, print_linear, parse_linear),
    Kind("merge", Merge, _own, verify_merge, interpret_merge, print_merge, parse_merge),
    Kind("correct", Correct, _own, verify_correct, interpret_correct, print_correct, parse_correct),
    Kind("rearrange", Rearrange, _own, verify_rearrange, interpret_rearrange, print_rearrange, parse_rearrange),
    Kind("layout", Layout, _own, verify_layout, interpret_layout, print_layout, parse_layout),
    Kind("order", Order, _own, verify_order, interpret_order, print_order, parse_order),
    Kind("scores", Scores, _own, verify_scores, interpret_scores, print_scores, parse_scores),
    Kind("select", Select, _own, verify_select, interpret_select, print_select, parse_select),
    Kind("reduce", Reduce, _own, verify_reduce, interpret_reduce, print_reduce, parse_reduce),
    Kind("boxes", Boxes, _own, verify_boxes, interpret_boxes, print_boxes, parse_boxes),
    Kind("table", Table, _own, verify_table, interpret_table, print_table, parse_table),
)
_BY_TYPE = {kind.type: kind for kind in KINDS}
_BY_TITLE = {kind.title: kind for kind in KINDS}


def kind_of(node: Node) -> Kind:
    """The kind of a node. Raises TypeError for a value that is none."""
    found = _BY_TYPE.get(type(node))
    if found is None:
        raise TypeError(f"a {type(node).__name__} is not a node of the IR")
    return found


def kind_called(title: str) -> Kind | None:
    """The kind whose text begins with `title`, if there is one."""
    return _BY_TITLE.get(title)
