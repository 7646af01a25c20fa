"""Graphs inside of a graph, as the reader of attentions wants them: each run once, in the one trace.

What is inside of a branch, or of a turn of a loop, is then read with all that is known around it. What goes from turn
to turn, and the result of a loop, is a tensor of which nothing but the type and the shape is known. A branch that may
be taken or not gives `where(taken, one, other)`, which is what it computes where the shapes are equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext, statically_known_true

from attncc import torch_private
from attncc.frontends.onnx.control import RunGraph, captured, graphs_of, truth
from attncc.frontends.onnx.values import Unsupported, axis_of, is_number, on_host, tensor

if TYPE_CHECKING:
    import onnx_ir as ir

#: Made-up sizes start here, each another number, as equal ones are taken for the same.
_FIRST, _STEP = 10007, 2


def control_flow(*reads: Any) -> Any:
    """What `If`, `Loop` or `Scan` gives, in a trace that is only read."""
    raise NotImplementedError


@dataclass(frozen=True)
class Turn:
    """What a turn of a `Scan` is given: the states before the first, a turn's part of what is scanned, and what its
    body reads around it. `axes` are the scanned dimensions, `out_axes` those of what is gathered."""

    states: Sequence[torch.Tensor]
    along: Sequence[torch.Tensor]
    around: Mapping[Any, Any]
    axes: Sequence[int]
    out_axes: Sequence[int]
    backwards: bool


@dataclass
class Inlined:
    """What nodes that hold graphs give in a trace on fake tensors; `scans` is what those of the kind `Scan` are given.
    """

    mode: FakeTensorMode
    made: int = field(default=0)
    scans: dict[ir.Node, Turn] = field(default_factory=dict["ir.Node", Turn])

    def run(self, run: RunGraph, node: ir.Node, given: Sequence[Any], known: Mapping[Any, Any]) -> tuple[Any, ...]:
        """Raises Unsupported."""
        return {"If": self._branch, "Loop": self._loop, "Scan": self._scan}[node.op_type](run, node, given, known)

    def _branch(self, run: RunGraph, node: ir.Node, given: Sequence[Any], known: Mapping[Any, Any]) -> tuple[Any, ...]:
        graphs = graphs_of(node)
        taken = truth(given[0])
        if taken is not None:
            return tuple(run(graphs["then_branch" if taken else "else_branch"], (), known))
        one, other = (run(graphs[name], (), known) for name in ("then_branch", "else_branch"))
        return tuple(self._either(given[0].reshape(()), x, y) for x, y in zip(one, other, strict=True))

    def _either(self, taken: torch.Tensor, x: Any, y: Any) -> Any:
        if on_host(x) and on_host(y) and not is_number(x) and len(x) != len(y):
            raise Unsupported("gives shapes of different ranks")
        if type(x) is type(y) and type(x) in (int, float, bool) and x == y:
            return x
        x, y = tensor(x), tensor(y)
        if x.ndim != y.ndim or x.dtype != y.dtype:
            raise Unsupported("gives tensors of different ranks or types")
        if all(_same(n, m) for n, m in zip(x.shape, y.shape, strict=True)):
            return torch.where(taken, x, y)
        shape = [n if _same(n, m) else None for n, m in zip(x.shape, y.shape, strict=True)]
        return self._unknown(shape, x.dtype, taken, x, y)

    def _loop(self, run: RunGraph, node: ir.Node, given: Sequence[Any], known: Mapping[Any, Any]) -> tuple[Any, ...]:
        body = graphs_of(node)["body"]
        starts = [tensor(x) for x in given[2:]]
        more = torch.ones((), dtype=torch.bool)
        at, goes_on = self._unknown([], torch.int64, more), self._unknown([], torch.bool, more)
        new = self._turn(lambda xs: run(body, (at, goes_on, *xs), known)[1:], starts)
        turns = given[0] if is_number(given[0]) else None
        turns = given[0][0] if isinstance(given[0], list) and len(given[0]) == 1 else turns
        stacks = [self._unknown([turns, *x.shape], x.dtype, x) for x in new[len(starts) :]]
        return (*(self._unknown(list(x.shape), x.dtype, x) for x in new[: len(starts)]), *stacks)

    def _scan(self, run: RunGraph, node: ir.Node, given: Sequence[Any], known: Mapping[Any, Any]) -> tuple[Any, ...]:
        how = {name: a.value for name, a in node.attributes.items() if name != "body"}
        body, count = graphs_of(node)["body"], int(how["num_scan_inputs"])
        starts, along = [tensor(x) for x in given[:-count]], [tensor(x) for x in given[-count:]]
        axes = [axis_of(a, x.ndim) for a, x in zip(how.get("scan_input_axes") or [0] * count, along, strict=True)]
        turns = along[0].shape[axes[0]]
        each = [self._unknown([n for d, n in enumerate(x.shape) if d != a], x.dtype, x)
                for a, x in zip(axes, along, strict=True)]  # fmt: skip
        out_axes = list(how.get("scan_output_axes") or [0] * (len(body.outputs) - len(starts)))
        ways = how.get("scan_input_directions"), how.get("scan_output_directions")
        self.scans[node] = Turn(starts, each, {x: known[x] for x in captured(body)}, axes, out_axes,
                                any(any(x or ()) for x in ways))  # fmt: skip
        new = self._turn(lambda xs: run(body, (*xs, *each), known), starts)
        states, made = new[: len(starts)], new[len(starts) :]
        stacks: list[torch.Tensor] = []
        for a, x in zip(out_axes, made, strict=True):
            shape: list[Any] = list(x.shape)
            shape.insert(axis_of(a, x.ndim + 1), turns)
            stacks.append(self._unknown(shape, x.dtype, x))
        return (*(self._unknown(list(x.shape), x.dtype, x) for x in states), *stacks)

    def _turn(self, turn: Any, starts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What a turn gives for carried tensors as unknown as those that it carries on; sizes that change are open."""
        shapes: list[list[Any]] = [list(x.shape) for x in starts]
        while True:  # each time a size more is open
            new = [tensor(x) for x in turn([self._unknown(n, x.dtype, x) for n, x in zip(shapes, starts, strict=True)])]
            again = [
                [n if n is None or _same(n, m) else None for n, m in zip(shape, x.shape, strict=True)]
                if len(shape) == x.ndim else None for shape, x in zip(shapes, new, strict=False)
            ]  # fmt: skip
            if None in again:
                raise Unsupported("carries tensors whose rank changes")
            if again == shapes:
                return new
            shapes = [x for x in again if x is not None]

    def _unknown(self, shape: Sequence[Any], dtype: torch.dtype, *reads: torch.Tensor) -> torch.Tensor:
        """A tensor made of `reads` in some way; None in the shape is a size that nothing says."""
        opened = [self._size() if n is None else n for n in shape]
        with torch_private.untraced():
            fake = torch.empty(opened, dtype=dtype)
        places = [n for n in map(torch_private.traced_node, reads) if n is not None]
        node = torch_private.traced_graph().call_function(control_flow, tuple(places))
        node.meta["val"] = fake
        torch_private.stands_for(node, fake)
        return fake

    def _size(self) -> Any:
        """A size of its own."""
        self.made += 1
        context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC], constraint_sizes=[None])
        with torch_private.untraced():
            real = torch.empty(_FIRST + _STEP * self.made, device="meta")
            fake: FakeTensor = self.mode.from_tensor(real, symbolic_context=context, static_shapes=False)
        return fake.shape[0]


def _same(n: Any, m: Any) -> bool:
    return statically_known_true(n == m)
