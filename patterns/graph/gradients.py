"""Where autograd follows a graph, and where the model stops it: `detach`, `.data`, regions without gradients.

Autograd follows tensors as objects. A view belongs to the tensor that it is a view of; a write in place makes that
tensor, and all views of it, depend on what is written. A detached tensor, or a view made while gradients are off,
shares memory with what it was made from and is a tensor of its own: a write to one of the two is not seen from the
other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from typing import Any, cast

import torch
from torch import fx

from attncc.patterns.graph.operators import op_name, storage_id, written_args

_DETACHED = {"detach", "detach_"}
#: Their results do not depend on what their arguments hold.
_UNRELATED = {
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like", "new_zeros",
    "new_ones", "new_full", "new_empty", "new_empty_strided",
}  # fmt: skip
_NEVER = 1 << 62


class Gradients:
    """What autograd sees of the nodes of a graph, given the inputs that require gradients (`starts`) and the nodes that
    are computed while gradients are off (`off`). Positions are those of the graph."""

    def __init__(
        self, nodes: Sequence[fx.Node], starts: Collection[fx.Node], off: Collection[fx.Node],
        storage: Callable[[fx.Node], int | None],
    ) -> None:  # fmt: skip
        self._storage = storage
        self._tensor: dict[fx.Node, int] = {}  # a node -> the tensor that it belongs to, as autograd has them
        self._since: dict[int, int] = defaultdict(lambda: _NEVER)  # a tensor -> from where on it is followed
        self._reached: set[int] = set()  # tensors that depend on an input that requires gradients, stops or not
        self._unseen: dict[int, list[fx.Node]] = defaultdict(list)  # a tensor -> writes to its memory that it misses
        self._in_memory: dict[int, set[int]] = defaultdict(set)
        for at, n in enumerate(nodes):
            if n in starts or (op_name(n) == "requires_grad_" and n.args[1:] != (False,)):
                self._begin(n, at, followed=True, reached=True)
            elif n.op == "call_function":
                self._called(n, at, off=n in off)
            else:
                self._begin(n, at, followed=False, reached=False)

    def _called(self, n: fx.Node, at: int, *, off: bool) -> None:
        inputs = [a for a in n.all_input_nodes if a in self._tensor]
        differs = _is_float(n.meta.get("val")) and op_name(n) not in _UNRELATED
        reached = differs and any(self._tensor[a] in self._reached for a in inputs)
        followed = differs and not off and any(self.follows(a, at) for a in inputs)
        written = [w for w in written_args(n) if w in self._tensor]
        for w in written:
            self._written(w, n, at, followed=followed, reached=reached, off=off)
        source = written[0] if written else None if off else self._viewed(n, inputs)
        if source is not None and op_name(n) not in _DETACHED:
            self._tensor[n] = self._tensor[source]
        else:
            self._begin(n, at, followed=followed and op_name(n) not in _DETACHED, reached=reached)

    def _begin(self, n: fx.Node, at: int, *, followed: bool, reached: bool) -> None:
        """A tensor that is none of those before."""
        tensor = self._tensor[n] = at
        if followed:
            self._since[tensor] = at
        if reached:
            self._reached.add(tensor)
        held = self._storage(n)
        if held is not None:
            self._in_memory[held].add(tensor)

    def _written(self, w: fx.Node, n: fx.Node, at: int, *, followed: bool, reached: bool, off: bool) -> None:
        tensor, held = self._tensor[w], self._storage(w)
        for other in self._in_memory[held] if held is not None else ():
            if (other != tensor or off) and self._since[other] < at:
                self._unseen[other].append(n)
        if followed:
            self._since[tensor] = min(self._since[tensor], at)
        if reached:
            self._reached.add(tensor)

    def _viewed(self, n: fx.Node, inputs: Sequence[fx.Node]) -> fx.Node | None:
        """The input that a node is a view, or a part, of."""
        if getattr(n.target, "__name__", "") == "getitem" and inputs:
            return inputs[0]
        value: Any = n.meta.get("val")
        parts = cast("list[Any]", value) if isinstance(value, list | tuple) else []
        held = storage_id(parts[0]) if parts else self._storage(n)
        return next((a for a in inputs if held is not None and self._storage(a) == held), None)

    def follows(self, n: fx.Node, when: int) -> bool:
        """Whether autograd follows what `n` holds as a node at position `when` reads it."""
        if n not in self._tensor:  # made beside the graph
            inputs = n.all_input_nodes
            return op_name(n) not in _DETACHED and any(self.follows(a, when) for a in inputs)
        return self._since[self._tensor[n]] < when

    def reached(self, n: fx.Node) -> bool:
        """Whether `n` depends on an input that requires gradients, through stops too."""
        if n not in self._tensor:
            return any(self.reached(a) for a in n.all_input_nodes)
        return self._tensor[n] in self._reached

    def stopped(self, n: fx.Node, when: int) -> bool:
        """Whether `n` depends on an input that requires gradients and is not followed."""
        return self.reached(n) and not self.follows(n, when)

    def unseen(self, n: fx.Node, write: fx.Node) -> bool:
        """Whether a write changed `n` behind autograd's back, while it was followed."""
        return write in self._unseen.get(self._tensor.get(n, -1), ())


def _is_float(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_is_float(x) for x in cast("list[Any]", value))
    return isinstance(value, torch.Tensor) and (value.dtype.is_floating_point or value.dtype.is_complex)
