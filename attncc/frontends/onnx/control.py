"""`If`, `Loop` and `Scan`: graphs inside of a graph, run in torch.

What is decided while it runs, on tensors that hold data or on shapes, is run as Python would: a branch is taken, a loop
is unrolled. In a trace, what only the data says becomes torch's own operator: `cond`, `while_loop`, `scan`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from attncc.frontends.onnx.values import Unsupported, axis_of, integers, is_number, number, tensor
from attncc.torch_private import control_flow

if TYPE_CHECKING:
    import onnx_ir as ir

#: Turns of a loop that are written out in a trace.
MOST_UNROLLED = 64

#: How a graph is run: (graph, its inputs, what is known around it) -> its outputs.
RunGraph = Callable[["ir.Graph", Sequence[Any], Mapping[Any, Any]], list[Any]]
#: How a node that holds graphs is: (run a graph, the node, its inputs, what is known around it) -> its outputs.
Control = Callable[[RunGraph, "ir.Node", Sequence[Any], Mapping[Any, Any]], tuple[Any, ...]]


def graphs_of(node: ir.Node) -> dict[str, ir.Graph]:
    """The graphs that a node holds, by the names of its attributes."""
    import onnx_ir as ir  # noqa: PLC0415 an extra

    return {name: a.as_graph() for name, a in node.attributes.items() if a.type == ir.AttributeType.GRAPH}


def captured(graph: ir.Graph) -> list[ir.Value]:
    """What a graph, and those inside of it, read of the graphs around it, once each."""
    own: set[Any] = {*graph.inputs, *graph.initializers.values()}
    found: dict[Any, None] = {}
    for node in graph:
        read = [x for x in node.inputs if x is not None]
        for inner in graphs_of(node).values():
            read += captured(inner)
        found.update((x, None) for x in read if x not in own)
        own.update(node.outputs)
    found.update((x, None) for x in graph.outputs if x not in own)
    return list(found)


def run_control(run: RunGraph, node: ir.Node, given: Sequence[Any], known: Mapping[Any, Any]) -> tuple[Any, ...]:
    """What a node that holds graphs gives. Raises Unsupported."""
    return {"If": _branch, "Loop": _loop, "Scan": _scan}[node.op_type](run, node, given, known)


def truth(x: Any) -> bool | None:
    """What a condition is, where a run knows it; None in a trace where only the data says."""
    if is_number(x):
        return bool(x)
    if isinstance(x, list):
        return bool(number(x))
    traced = isinstance(x, FakeTensor) or type(x) is not torch.Tensor or torch.compiler.is_compiling()
    return None if traced else bool(x.reshape(()).item())


def _branch(run: RunGraph, node: ir.Node, given: Sequence[Any], known: Mapping[Any, Any]) -> tuple[Any, ...]:
    graphs = graphs_of(node)
    yes, no = graphs["then_branch"], graphs["else_branch"]
    taken = truth(given[0])
    if taken is not None:
        return tuple(run(yes if taken else no, (), known))
    held = _Held({x: known[x] for g in (yes, no) for x in captured(g)}, ())

    def of(graph: ir.Graph) -> Callable[..., tuple[torch.Tensor, ...]]:
        return lambda *xs: tuple(tensor(x).clone() for x in run(graph, (), held.known(xs)))

    return control_flow.cond(given[0].reshape(()), of(yes), of(no), held.tensors)


def _loop(run: RunGraph, node: ir.Node, given: Sequence[Any], known: Mapping[Any, Any]) -> tuple[Any, ...]:
    body = graphs_of(node)["body"]
    most, goes_on, *carried = given
    turns = number(most) if isinstance(most, list) else most
    if isinstance(turns, torch.Tensor):
        turns = turns.reshape(()) if isinstance(turns, FakeTensor) else int(turns.reshape(()).item())
    count = len(carried)
    whole = type(turns) is int and turns <= MOST_UNROLLED
    eager = not any(isinstance(x, FakeTensor) for x in (*given, *known.values()) if x is not None)
    if (whole or eager) and (goes_on is None or truth(goes_on) is not None):
        found = _unrolled(run, body, turns if type(turns) is int else None, goes_on, carried, known)
        if found is not None:
            return found
    if len(body.outputs) - 1 > count:
        if not isinstance(turns, torch.Tensor) and (goes_on is None or truth(goes_on)):
            return _stacked_loop(run, body, turns, carried, known)
        raise Unsupported("gives something of every turn, and only the data says how many turns it takes")
    limit = (1 << 62) if turns is None else turns
    held = _Held({x: known[x] for x in captured(body)}, (limit,))
    start = (torch.zeros((), dtype=torch.int64), torch.ones((), dtype=torch.bool) if goes_on is None
             else tensor(goes_on).reshape(()).clone(), *(tensor(x).clone() for x in carried))  # fmt: skip

    def going(at: Any, more: Any, *rest: Any) -> Any:
        return more & (at < held.more(rest[count:])[0])

    def turn(at: Any, more: Any, *rest: Any) -> Any:
        again, *new = run(body, (at, more, *rest[:count]), held.known(rest[count:]))
        return at + 1, tensor(again).reshape(()).clone(), *(tensor(x).clone() for x in new)

    return control_flow.while_loop(going, turn, start, held.tensors)[2:]


def _unrolled(
    run: RunGraph, body: ir.Graph, turns: int | None, goes_on: Any, carried: Sequence[Any], known: Mapping[Any, Any]
) -> tuple[Any, ...] | None:
    """A loop turn by turn; None where only the data says when it ends."""
    at, more, now = 0, True if goes_on is None else truth(goes_on), list(carried)
    every: list[list[Any]] = []
    while more and (turns is None or at < turns):
        again, *new = run(body, (at, more, *now), known)
        more = truth(again)
        if more is None:
            return None
        now, each = new[: len(now)], new[len(now) :]
        every.append(each)
        at += 1
    kinds = body.outputs[1 + len(now) :]
    stacks = [torch.stack([tensor(each[n]) for each in every]) if every else _none(v) for n, v in enumerate(kinds)]
    return (*now, *stacks)


def _none(v: ir.Value) -> torch.Tensor:
    """What a loop of no turns gives of every turn."""
    from attncc.frontends.onnx.values import DTYPES  # noqa: PLC0415

    dtype = None if v.dtype is None else DTYPES.get(int(v.dtype))
    if dtype is None or v.shape is None or not all(isinstance(n, int) for n in v.shape):
        raise Unsupported("takes no turn, and nothing says what its outputs look like")
    return torch.empty((0, *(int(n) for n in v.shape)), dtype=dtype)  # type: ignore[arg-type]


def _stacked_loop(
    run: RunGraph, body: ir.Graph, turns: Any, carried: Sequence[Any], known: Mapping[Any, Any]
) -> tuple[Any, ...]:
    """A loop of a known number of turns, which gives something of every turn."""
    if turns is None:
        raise Unsupported("gives something of every turn, and only the data says how many turns it takes")

    def turn(xs: Sequence[Any], at: Sequence[Any], around: Mapping[Any, Any]) -> list[Any]:
        again, *new = run(body, (at[0], True, *xs), around)
        if truth(again) is not True:
            raise Unsupported("gives something of every turn, and only the data says how many turns it takes")
        return new

    return _along(turn, body, carried, [torch.arange(turns)], known)


def _along(
    turn: Callable[[Sequence[Any], Sequence[Any], Mapping[Any, Any]], list[Any]], body: ir.Graph,
    carried: Sequence[Any], along: Sequence[Any], known: Mapping[Any, Any],
) -> tuple[Any, ...]:  # fmt: skip
    held = _Held({x: known[x] for x in captured(body)}, ())
    n, m = len(carried), len(along)

    def combine(*xs: Any) -> Any:
        new = [tensor(x).clone() for x in turn(xs[:n], xs[n : n + m], held.known(xs[n + m :]))]
        return [*new[:n], *new[n:]]

    return control_flow.scan(combine, [tensor(x).clone() for x in carried], along, held.tensors)


def _scan(run: RunGraph, node: ir.Node, given: Sequence[Any], known: Mapping[Any, Any]) -> tuple[Any, ...]:
    how = {name: a.value for name, a in node.attributes.items() if name != "body"}
    body = graphs_of(node)["body"]
    count = int(how["num_scan_inputs"])
    if len(body.inputs) != len(given):
        raise Unsupported("has the form of opset 8")
    states, along = list(given[: len(given) - count]), [tensor(x) for x in given[len(given) - count :]]
    axes = integers(list(how.get("scan_input_axes") or [0] * count))
    back = list(how.get("scan_input_directions") or [0] * count)
    made = len(body.outputs) - len(states)
    out_axes, out_back = (list(how.get(name) or [0] * made) for name in ("scan_output_axes", "scan_output_directions"))
    along = [x.movedim(axis_of(a, x.ndim), 0) for x, a in zip(along, axes, strict=True)]
    along = [x.flip(0) if b else x for x, b in zip(along, back, strict=True)]
    turns = along[0].shape[0]
    if (type(turns) is int and turns <= MOST_UNROLLED) or not isinstance(along[0], FakeTensor):
        now, every = list(states), list[list[Any]]()
        for at in range(int(turns)):
            new = run(body, (*now, *(x.select(0, at) for x in along)), known)
            now = new[: len(states)]
            every.append(new[len(states) :])
        kinds = body.outputs[len(states) :]
        found = [
            torch.stack([tensor(each[n]) for each in every]) if every else _none(v) for n, v in enumerate(kinds)
        ]
    else:
        *now, = _along(lambda xs, ys, around: run(body, (*xs, *ys), around), body, states, along, known)
        now, found = now[: len(states)], now[len(states) :]
    stacks = [x.flip(0) if b else x for x, b in zip(found, out_back, strict=True)]
    return (*now, *(x.movedim(0, axis_of(a, x.ndim)) for x, a in zip(stacks, out_axes, strict=True)))


class _Held:
    """What a graph reads around it, as the tensors and sizes that torch's operators hand on, and back again."""

    def __init__(self, around: Mapping[Any, Any], more: tuple[Any, ...]) -> None:
        self.values = list(around)
        leaves, self.form = tree_flatten([list(around.values()), list(more)])
        self.fixed = {n: x for n, x in enumerate(leaves) if not isinstance(x, torch.Tensor | torch.SymInt)}
        self.tensors = [x for n, x in enumerate(leaves) if n not in self.fixed]
        self.count = len(leaves)

    def _whole(self, given: Sequence[Any]) -> Any:
        rest = iter(given)
        return tree_unflatten([self.fixed[n] if n in self.fixed else next(rest) for n in range(self.count)], self.form)

    def known(self, given: Sequence[Any]) -> dict[Any, Any]:
        return dict(zip(self.values, self._whole(given)[0], strict=True))

    def more(self, given: Sequence[Any]) -> list[Any]:
        return self._whole(given)[1]
