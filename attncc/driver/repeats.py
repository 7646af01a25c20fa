"""Operations like one that was traced before are copied, not traced: equal layers cost one trace.

A Dynamo node with the target and arguments of an earlier one (equal constants and sizes, tensors of equal shapes,
strides and dtypes) gives the same ATen nodes on its own arguments. Its result is the fake tensor that Dynamo made for
it, so that views alias what they alias in the model; the nodes on the way there look like those of the first, and are
told what memory they lie in. Sizes that are symbols are equal where their formulas are: a copy reads the nodes of the
first.

Nothing is copied that the looks of the arguments do not decide: what writes, what draws numbers from data, what a
transform or a constant of the trace changes. It is then traced, each time.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor

from attncc import torch_private
from attncc.patterns.graph.operators import MEMORY, formula
from attncc.torch_private.state import Modes, modes


@dataclass(frozen=True)
class _Given:
    """The tensor argument number `at` of the operation."""

    at: int


@dataclass(frozen=True)
class _Made:
    """What step number `at` of the copy makes."""

    at: int


_Source = _Given | _Made


@dataclass(frozen=True)
class _Looks:
    """How a step's value looks, and what it is a view of: memory of its own where that is None."""

    like: FakeTensor
    base: _Source | None


@dataclass(frozen=True)
class _Step:
    """One node of the copy, its tensors being `_Source`s. `value` is none for a result, which Dynamo has a tensor for,
    and for a node that gives several tensors."""

    target: Any
    args: Any
    kwargs: Any
    value: _Looks | None


def _values(found: Modes) -> Iterator[object]:
    return (value for _, value in found)


class _Unlike(Exception):
    """Not to be copied: an argument or a node depends on more than its looks."""


class Repeats:
    """What was traced in one shadow so far. Tensors that are Dynamo's own fakes stand in the trace for its results."""

    def __init__(self) -> None:
        self._steps: dict[object, tuple[_Step, ...]] = {}  # none: to be traced each time
        self._owned: dict[int, torch.Tensor] = {}
        self._memories = 0

    def run(self, n: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any], trace: Callable[[], Any]) -> Any:
        """The result of `n` inside the trace in progress: copied where one like it was traced, else by `trace`."""
        like = n.meta.get("example_value")
        if n.op == "placeholder":
            result = trace()
            if result is like and isinstance(like, torch.Tensor):
                self._owned[id(like)] = like
            return result
        calls = n.op in ("call_function", "call_method") and isinstance(like, FakeTensor | tuple | list)
        if not calls or torch_private.inside_transform():
            return trace()
        tensors: list[torch.Tensor] = []
        with torch_private.unobserved():
            try:
                given = self._looks((args, kwargs), tensors)
                looks = (n.op, n.target, given, _layout(like), torch.is_inference_mode_enabled(), *_values(modes()))
            except _Unlike:
                looks = None
            if looks is not None and self._steps.get(looks):
                return self._copied(self._steps[looks], tensors, like)
        return trace() if looks is None or looks in self._steps else self._first(looks, tensors, like, trace)

    def _first(self, looks: object, tensors: list[torch.Tensor], like: Any, trace: Callable[[], Any]) -> Any:
        """Trace an operation, and learn from what that made."""
        self._steps[looks] = ()
        sources = [torch_private.traced_node(t) for t in tensors]
        before = next(iter(reversed(torch_private.traced_graph().nodes)))
        result = trace()
        made = [n for n in _since(before) if not _is_number(n)]
        try:
            with torch_private.unobserved():
                steps = _learned(made, sources, tensors, result, like)
        except _Unlike:
            return result
        self._steps[looks] = steps
        return self._own(made, steps, tensors, like)

    def _copied(self, steps: tuple[_Step, ...], tensors: list[torch.Tensor], like: Any) -> Any:
        graph = torch_private.traced_graph()
        sources = [torch_private.traced_node(t) for t in tensors]
        made: list[fx.Node] = []

        def node(x: Any) -> Any:
            return sources[x.at] if isinstance(x, _Given) else made[x.at] if isinstance(x, _Made) else x

        for step in steps:
            args, kwargs = fx.node.map_aggregate((step.args, step.kwargs), node)  # type: ignore[misc]
            made.append(graph.call_function(step.target, args, kwargs))
        return self._own(made, steps, tensors, like)

    def _own(self, made: list[fx.Node], steps: tuple[_Step, ...], tensors: list[torch.Tensor], like: Any) -> Any:
        """Let Dynamo's tensors stand for the last of the nodes that were made."""
        results = [like] if isinstance(like, torch.Tensor) else like
        for n, x in zip(made[-len(results) :], results, strict=True):
            n.meta["val"] = x
            torch_private.stands_for(n, x)
            self._owned[id(x)] = x
        if not isinstance(like, torch.Tensor):  # the parts of one operation, asked for by it
            made[-len(results) - 1].meta["val"] = list(results)
        for n, step in zip(made, steps, strict=True):
            if step.value is not None:
                n.meta["val"], n.meta[MEMORY] = step.value.like, self._memory(step.value.base, made, tensors)
        return like

    def _memory(self, base: _Source | None, made: list[fx.Node], tensors: list[torch.Tensor]) -> int:
        """The memory of a view of `base`. New memory has a number that no storage has."""
        if base is None:
            self._memories += 1
            return -self._memories
        if isinstance(base, _Given):
            return torch_private.storage(tensors[base.at])
        n = made[base.at]
        return n.meta[MEMORY] if MEMORY in n.meta else torch_private.storage(n.meta["val"])

    def _looks(self, x: Any, tensors: list[torch.Tensor]) -> object:
        """A key of an argument, in which tensors are equal by layout and by what they share memory with. They are
        appended to `tensors`. Raises _Unlike for one that is not Dynamo's own."""
        if isinstance(x, torch.Tensor):
            for at, t in enumerate(tensors):
                if t is x:
                    return at
            if id(x) not in self._owned:
                raise _Unlike
            tensors.append(x)
            held = torch_private.storage(x)
            return next(at for at, t in enumerate(tensors) if torch_private.storage(t) == held), _layout(x)
        if isinstance(x, _PLAIN):
            return (type(x), x)
        if isinstance(x, torch.SymInt):
            return _length(x)
        if isinstance(x, float):
            return (float, repr(x))
        if isinstance(x, slice):
            return (slice, *(self._looks(y, tensors) for y in (x.start, x.stop, x.step)))
        if isinstance(x, tuple | list):
            return (type(x), *(self._looks(y, tensors) for y in x))
        if isinstance(x, Mapping):
            return (dict, *((name, self._looks(y, tensors)) for name, y in x.items()))
        raise _Unlike


_PLAIN = (
    type(None), bool, int, str, torch.dtype, torch.device, torch.layout, torch.memory_format, type(...),
)  # fmt: skip


def _layout(x: Any) -> tuple[object, ...]:
    """All that an operation may ask of a fake tensor, or of several. Raises _Unlike for memory that is not strided."""
    if isinstance(x, tuple | list):
        return tuple(_layout(y) for y in x)
    if not isinstance(x, FakeTensor) or x.layout != torch.strided:
        raise _Unlike
    lengths = tuple(_length(n) for n in (*x.shape, *x.stride(), x.storage_offset()))
    return (x.dim(), lengths, x.dtype, x.device, x.requires_grad, x.is_conj(), x.is_neg(), x.is_inference())


def _length(n: int | torch.SymInt) -> object:
    """A key of a number: symbols of one formula are one number wherever they stand in a graph."""
    return ("size", formula(n)) if isinstance(n, torch.SymInt) else n


_NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool)
_SIZES = {
    torch.ops.aten.sym_size.int, torch.ops.aten.sym_stride.int, torch.ops.aten.sym_numel.default,
    torch.ops.aten.sym_storage_offset.default,
}  # fmt: skip


def _is_number(n: fx.Node) -> bool:
    """Whether a node is a number that the shapes of tensors decide, so that equal formulas make it the same one."""
    return isinstance(n.meta.get("val"), _NUMBERS) and (
        n.target in _SIZES or all(isinstance(a.meta.get("val"), _NUMBERS) for a in n.all_input_nodes)
    )


def _since(before: fx.Node) -> list[fx.Node]:
    """The nodes that the trace in progress made after one."""
    found: list[fx.Node] = []
    while (n := before.next if not found else found[-1].next).op != "root":
        found.append(n)
    return found


def _learned(
    made: list[fx.Node], sources: list[fx.Node | None], tensors: list[torch.Tensor], result: Any, like: Any
) -> tuple[_Step, ...]:
    """The steps that make `made` from `tensors`, the last of which give `result`. Raises _Unlike where they do not,
    read anything else, or write."""
    results: list[torch.Tensor] = [result] if isinstance(result, torch.Tensor) else list(result)
    last = made[-len(results) :] if results else []
    several = None if isinstance(result, torch.Tensor) else made[-len(results) - 1 :][0]
    if type(result) is not type(like) or _layout(result) != _layout(like) or several in last:
        raise _Unlike
    if [torch_private.traced_node(x) for x in results] != last or any(map(torch_private.traced_constant, results)):
        raise _Unlike
    if several is not None and any(n.target is not operator.getitem or n.args[0] is not several for n in last):
        raise _Unlike
    places: dict[fx.Node, _Source] = {n: _Given(at) for at, n in enumerate(sources) if n is not None}
    memory = _Bases([*((_Given(at), t) for at, t in enumerate(tensors)),
                     *((_Made(at), x) for at, x in enumerate(results, len(made) - len(results)))])  # fmt: skip

    def place(n: fx.Node) -> _Source | fx.Node:
        if n not in places and not isinstance(n.meta.get("val"), _NUMBERS):
            raise _Unlike
        return places.get(n, n)  # a number is the same one in each copy

    steps: list[_Step] = []
    for at, n in enumerate(made):
        if not (n.target is operator.getitem or (isinstance(n.target, OpOverload) and not n.target._schema.is_mutable)):
            raise _Unlike
        args, kwargs = fx.node.map_arg((n.args, dict(n.kwargs)), place)  # type: ignore[misc]
        places[n] = _Made(at)
        inner = n not in last and n is not several
        steps.append(_Step(n.target, args, kwargs, memory.of(_Made(at), n.meta.get("val")) if inner else None))
    return tuple(steps)


class _Bases:
    """The first tensor of each memory."""

    def __init__(self, known: Sequence[tuple[_Source, torch.Tensor]]) -> None:
        self._first: dict[int, _Source] = {}
        for at, x in known:
            self._first.setdefault(torch_private.storage(x), at)

    def of(self, at: _Made, x: Any) -> _Looks:
        if not isinstance(x, FakeTensor):  # several tensors, of which the operation goes on with some
            raise _Unlike
        _layout(x)  # raises for what is not strided
        base = self._first.setdefault(torch_private.storage(x), at)
        return _Looks(x, None if base == at else base)
