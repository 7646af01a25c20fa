"""Operations like one that was traced before are copied, not traced: equal layers cost one trace.

A Dynamo node with the target and arguments of an earlier one (equal constants, tensors of equal shapes, strides and
dtypes) gives the same ATen nodes on its own arguments. Its result is the fake tensor that Dynamo made for it, so that
views alias what they alias in the model; inner nodes get fake tensors laid out in memory as those of the first were.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from attncc import torch_private


@dataclass(frozen=True)
class _Slot:
    """The tensor argument number `at`, or the node number `at` of the copy where `inner`."""

    at: int
    inner: bool


@dataclass(frozen=True)
class _Inner:
    """The value of one copied node: a view of `base` (a `_Slot`), or memory of its own where that is None."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    base: _Slot | None


@dataclass(frozen=True)
class _Step:
    """One node of the copy. `value` is none for a result, and for a node that gives several tensors."""

    target: Any
    args: Any
    kwargs: Any
    value: _Inner | None


class _Unlike(Exception):
    """Not to be copied: an argument or a node depends on more than its looks."""


class Repeats:
    """What was traced in one shadow so far. Tensors that are Dynamo's own fakes stand in the trace for its results."""

    def __init__(self) -> None:
        self._steps: dict[object, tuple[_Step, ...]] = {}  # none: to be traced each time
        self._owned: dict[int, torch.Tensor] = {}
        self._unfilled: list[tuple[list[fx.Node], tuple[_Step, ...], list[torch.Tensor]]] = []

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
                looks = (n.op, n.target, self._looks((args, kwargs), tensors), _layout(like), torch.is_grad_enabled())
            except _Unlike:
                looks = None
            if looks is not None and self._steps.get(looks):
                return self._copied(self._steps[looks], tensors, like)
        return trace() if looks is None or looks in self._steps else self._first(looks, tensors, like, trace)

    def _first(self, looks: object, tensors: list[torch.Tensor], like: Any, trace: Callable[[], Any]) -> Any:
        """Trace an operation, and learn from what that made."""
        self._steps[looks] = ()
        graph = torch_private.traced_graph()
        sources = [torch_private.traced_node(t) for t in tensors]
        before = next(iter(reversed(graph.nodes)))
        result = trace()
        made: list[fx.Node] = []
        while (end := made[-1].prev if made else next(iter(reversed(graph.nodes)))) is not before:
            made.append(end)
        made.reverse()
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
            return (made if x.inner else sources)[x.at] if isinstance(x, _Slot) else x

        for step in steps:
            args, kwargs = fx.node.map_aggregate((step.args, step.kwargs), node)  # type: ignore[misc]
            made.append(graph.call_function(step.target, args, kwargs))
        return self._own(made, steps, tensors, like)

    def _own(self, made: list[fx.Node], steps: tuple[_Step, ...], tensors: list[torch.Tensor], like: Any) -> Any:
        results = [like] if isinstance(like, torch.Tensor) else like
        for n, x in zip(made[-len(results) :], results, strict=True):
            n.meta["val"] = x
            torch_private.stands_for(n, x)
            self._owned[id(x)] = x
        several = {next(iter(n.all_input_nodes)) if n.target is operator.getitem else n for n in made[-len(results) :]}
        if not isinstance(like, torch.Tensor) and len(several) == 1:  # the parts of one operation, asked for by it
            several.pop().meta["val"] = list(results)
        if len(made) > len(results):
            self._unfilled.append((made, steps, tensors))
        return like

    def fill(self, mode: FakeTensorMode) -> None:
        """Give every inner node its value. After the trace: inside it, making one would be traced too."""
        with mode, torch.no_grad():
            for made, steps, tensors in self._unfilled:
                for n, step in zip(made, steps, strict=True):
                    x = step.value
                    if x is None:  # a result, or several at once
                        continue
                    if x.base is None:
                        n.meta["val"] = torch.empty_strided(x.shape, x.stride, dtype=x.dtype, device=x.device)
                        continue
                    base: torch.Tensor = made[x.base.at].meta["val"] if x.base.inner else tensors[x.base.at]
                    n.meta["val"] = torch.as_strided(base.detach(), x.shape, x.stride, x.offset)

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
    """All that an operation may ask of a fake tensor, or of several. Raises _Unlike for symbolic sizes and for memory
    that is not strided."""
    if isinstance(x, tuple | list):
        return tuple(_layout(y) for y in x)
    if not isinstance(x, FakeTensor) or x.layout != torch.strided:
        raise _Unlike
    shape, stride, offset = tuple(x.shape), x.stride(), x.storage_offset()
    if not all(type(n) is int for n in (*shape, *stride, offset)):
        raise _Unlike
    return (shape, stride, offset, x.dtype, x.device, x.requires_grad, x.is_conj(), x.is_neg(), x.is_inference())


def _learned(
    made: list[fx.Node], sources: list[fx.Node | None], tensors: list[torch.Tensor], result: Any, like: Any
) -> tuple[_Step, ...]:
    """The steps that make `made` from `tensors`, the last of which give `result`. Raises _Unlike where they do not,
    read anything else, or write."""
    results: list[Any] = [result] if isinstance(result, torch.Tensor) else list(result)
    last = made[-len(results) :] if results else []
    if type(result) is not type(like) or _layout(result) != _layout(like) or len(made) < len(results):
        raise _Unlike
    if [torch_private.traced_node(x) for x in results] != last or any(map(torch_private.traced_constant, results)):
        raise _Unlike
    if not isinstance(result, torch.Tensor) and (
        len(made) == len(results) or not isinstance(made[-len(results) - 1].meta.get("val"), tuple | list)
    ):
        raise _Unlike
    places = {n: _Slot(at, False) for at, n in enumerate(sources) if n is not None}
    memory = {torch_private.storage(t): _Slot(at, False) for at, t in reversed(list(enumerate(tensors)))}
    bases = {_Slot(at, False): t for at, t in enumerate(tensors)}
    for at, x in enumerate(results, len(made) - len(results)):
        place = memory.setdefault(torch_private.storage(x), _Slot(at, True))
        bases.setdefault(place, x)

    def known(n: fx.Node) -> _Slot:
        if n not in places:
            raise _Unlike
        return places[n]

    steps: list[_Step] = []
    for at, n in enumerate(made):
        if not (n.target is operator.getitem or (isinstance(n.target, OpOverload) and not n.target._schema.is_mutable)):
            raise _Unlike
        args, kwargs = fx.map_arg((n.args, dict(n.kwargs)), known)  # type: ignore[misc]
        places[n] = here = _Slot(at, True)
        value: Any = n.meta.get("val")
        inner: _Inner | None = None
        if isinstance(value, tuple | list) and n is not made[-len(results) - 1]:
            raise _Unlike
        if n not in last and not isinstance(value, tuple | list):
            shape, stride, offset, dtype, device, *_ = _layout(value)
            base = memory.setdefault(torch_private.storage(value), here)
            if bases.setdefault(base, value).dtype != dtype:
                raise _Unlike
            inner = _Inner(shape, stride, offset, dtype, device, None if base is here else base)  # type: ignore[arg-type]
        steps.append(_Step(n.target, args, kwargs, inner))
    return tuple(steps)
