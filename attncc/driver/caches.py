"""Caches whose boxes are kept: tensors of keys that a graph is given, and writes to at known positions or not at all.

    cache[:, :, at] = k      cache.index_copy_(2, at, k)          at: positions along the keys, before they are read

Whatever else writes to a cache raises its version, which `attncc.runtime.kept` looks at; what a graph does itself is
not counted until it is over, and is read here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import fx

from attncc.driver.lowering import keys_of
from attncc.errors import EditError
from attncc.ir import Boxes, Program
from attncc.ir.boxes import order_of
from attncc.ir.reasons import Reason, because
from attncc.patterns.graph.facts import Facts
from attncc.patterns.site.program import SiteProgram

_aten = torch.ops.aten
#: The node that holds the positions which a graph writes to; None where it writes to none.
Positions = fx.Node | None


@dataclass(frozen=True)
class Cache:
    """`given`: the input of the shadow graph that the keys are a view of; `written`: the positions that the graph
    writes to before it reads them."""

    given: fx.Node
    written: Positions


@dataclass
class Caches:
    """Those of one graph. `node` finds the node that holds a value of the shadow, raising EditError where there is
    none; `arguments` are the numbers of the graph's inputs that have boxes beside them. `inner`: an operator of another
    graph runs this one, so that it is not called with what it is given."""

    facts: Facts
    graph: fx.Graph
    node: Callable[[fx.Node], fx.Node]
    inner: bool = False
    arguments: set[int] = field(default_factory=set)

    def beside(self, site: SiteProgram, final: Program) -> tuple[dict[str, Positions], Reason | None]:
        """The inputs of a program whose boxes are kept, with what the graph writes to; why those of others are not."""
        kept: dict[str, Positions] = {}
        reason: Reason | None = None
        given = dict(zip((t.name for t in final.inputs), zip(site.inputs, site.dtypes, strict=True), strict=True))
        for step in final.steps:
            if not isinstance(step.node, Boxes):
                continue
            name = keys_of(step)
            found = self._of(step.node, *given[name]) if name in given else because("cache-new")
            if isinstance(found, Reason):
                reason = found
            else:
                kept[name] = found
        return kept, reason

    def _of(self, a: Boxes, k: fx.Node, dtype: torch.dtype) -> Positions | Reason:
        if self.inner:
            return because("cache-new")
        if order_of(a) is None:
            return because("cache-read")
        if self.facts.dtype(k) != dtype:
            return because("cache-new")
        found = cache_of(k, a.k.index.index(a.j.index), self.facts)
        if isinstance(found, Reason):
            return found
        try:
            place = [n for n in self.graph.nodes if n.op == "placeholder"].index(self.node(found.given))
            written = None if found.written is None else self.node(found.written)
        except (EditError, ValueError):
            return because("cache-new")
        self.arguments.add(place)
        return written


def cache_of(k: fx.Node, dim: int, facts: Facts) -> Cache | Reason:
    """The cache that a tensor of keys is a view of, its keys along a dimension; or why nothing can lie beside it."""
    value = facts.value(k)
    given = [n for n in facts.nodes if n.op == "placeholder" and facts.aliases(n, k)]
    if len(given) != 1 or k in facts.made:
        return because("cache-new")
    if value.device.type != "cpu":
        return because("cache-device")
    if facts.gradients is not None:
        return because("cache-gradients")
    writes = facts.writes(k, -1, len(facts.nodes))
    if not writes:
        return Cache(given[0], None)
    found = _written(writes[0]) if len(writes) == 1 and facts.order[writes[0]] < _use(k, facts) else None
    if found is None:
        return because("cache-written")
    target, along, positions = found
    other = facts.value(target)
    known = _layout(value), _layout(other)
    same = value.storage_offset() == other.storage_offset() and known[0] is not None and known[0] == known[1]
    if not same or (value.shape[dim], value.stride(dim)) != (other.shape[along], other.stride(along)):
        return because("cache-written")
    if not facts.is_tensor(positions) or facts.dtype(positions) in (torch.bool, torch.uint8):
        return because("cache-written")
    return Cache(given[0], positions)


def _use(k: fx.Node, facts: Facts) -> int:
    """Where the first reader of a view of a cache stands, which is no view itself."""
    stack, found = [k], len(facts.nodes)
    while stack:
        for user in stack.pop().users:
            if user in facts.order and user not in facts.made:
                if facts.aliases(user, k):
                    stack.append(user)
                else:
                    found = min(found, facts.order[user])
    return found


def _written(n: fx.Node) -> tuple[fx.Node, int, fx.Node] | None:
    """(what is written to, the dimension, the positions along it) of a write of whole slices at positions."""
    if n.target is _aten.index_copy_.default:
        target, dim, positions = n.args[:3]
        return target, dim % target.meta["val"].dim(), positions  # type: ignore[return-value, union-attr, operator]
    if n.target is _aten.index_put_.default:
        target, indices = n.args[:2]
        along = [at for at, x in enumerate(indices) if x is not None]  # type: ignore[arg-type]
        if len(along) == 1:
            return target, along[0], indices[along[0]]  # type: ignore[return-value, index]
    return None


def _layout(x: torch.Tensor) -> list[tuple[int, int]] | None:
    """The sizes and strides of a tensor, in order; None where one is known at the call alone, or where elements share
    memory: two tensors of one layout at one place then have each index along a stride in common."""
    pairs = [(n, s) for n, s in zip(x.shape, x.stride(), strict=True) if not (type(n) is int and n == 1)]
    if any(type(n) is not int for n, _ in pairs[1:]) or any(type(s) is not int for _, s in pairs):
        return None
    found = sorted(pairs, key=lambda p: p[1])
    apart = all(inner[0] * inner[1] <= outer[1] for inner, outer in pairwise(found))
    return found if apart else None
