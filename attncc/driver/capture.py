"""Reading a Dynamo graph: its shadow in normal form, and for each shadow node the Dynamo node it came from.

The graph that Dynamo handed over stays the one that is edited and run; the shadow is only read. A Dynamo node that is
several ATen ops (`multi_head_attention_forward`) owns all of their shadow nodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator
from torch.utils._pytree import tree_leaves, tree_map_only

from attncc import torch_private
from attncc.driver.library_calls import given_by, hooked, in_place_of, is_given
from attncc.driver.repeats import Repeats
from attncc.driver.scalar_functions import without_items
from attncc.patterns.graph.facts import Facts
from attncc.patterns.softmax.flex import FLEX
from attncc.torch_private.distributed import crosses, is_distributed
from attncc.torch_private.floats import known_number
from attncc.torch_private.state import Modes, autocasts, modes


@dataclass
class Reading:
    """The shadow of a Dynamo graph and how the two correspond. `autocasts`: autocast is on somewhere in it. `graded`
    are the shadow's inputs that require gradients, `off` the nodes of both that run while gradients are off."""

    graph: fx.Graph
    shadow: fx.GraphModule
    origin: dict[fx.Node, fx.Node]
    owner: dict[fx.Node, fx.Node] = field(default_factory=dict)
    results: dict[fx.Node, Any] = field(default_factory=dict)
    bodies: list[Body] = field(default_factory=list)
    autocasts: bool = False
    graded: frozenset[fx.Node] = frozenset()
    off: frozenset[fx.Node] = frozenset()

    def over(self, graph: fx.Graph, nodes: Mapping[fx.Node, fx.Node]) -> Reading:
        """The same for a copy of the Dynamo graph, given the copy of each node."""
        return replace(
            self,
            graph=graph,
            origin={shadow: nodes[n] for shadow, n in self.origin.items()},
            owner={shadow: nodes[n] for shadow, n in self.owner.items()},
            results={nodes[n]: parts for n, parts in self.results.items()},
            off=frozenset(nodes.get(n, n) for n in self.off),
        )

    def distributed(self, shadow: fx.Node) -> bool:
        """Whether a node of the shadow stands for a tensor that is distributed over processes."""
        node = self.origin.get(shadow)
        return node is not None and is_distributed(node.meta.get("example_value"))

    def facts(self) -> Facts:
        """Facts of the shadow, with the dtypes that Dynamo saw (a trace does not see autocast)."""
        dtypes: dict[fx.Node, torch.dtype] = {}
        for shadow, node in self.origin.items():
            value = node.meta.get("example_value")
            if isinstance(value, torch.Tensor):
                dtypes[shadow] = value.dtype
        learned = {s for s, n in self.origin.items() if isinstance(n.meta.get("example_value"), torch.nn.Parameter)}
        called = (s for s in self.owner if s.op == "call_function")
        graded = frozenset[fx.Node]() if self.off.issuperset(called) else self.graded
        return Facts(self.shadow.graph, dtypes, frozenset(learned), graded, self.off)


def has_nested(gm: fx.GraphModule) -> bool:
    """Whether a Dynamo graph has tensors of rows of several lengths (jagged), which no trace of plain tensors shows."""
    values = (n.meta.get("example_value") for n in gm.graph.nodes)
    return any(isinstance(x, torch.Tensor) and x.is_nested for x in values)


@dataclass(frozen=True)
class Body:
    """The graph that a higher-order operator runs, its arguments as the trace has them, and what holds there."""

    module: fx.GraphModule
    arguments: list[Any]
    modes: Modes


#: Operators whose bodies take other tensors than they are given themselves, or of which there are several: a choice of
#: two, loops. What the bodies take is known of their own graphs.
_WITH_BODIES = {"cond", "while_loop", "scan", "map_impl"}


class _Shadow(fx.Interpreter):
    """Runs a Dynamo graph under a trace, noting which traced node holds each Dynamo node's result."""

    def __init__(self, module: fx.GraphModule, repeats: Repeats | None) -> None:
        super().__init__(module)
        self.repeats = repeats
        self.pairs: list[tuple[fx.Node, fx.Node]] = []
        self.made: list[tuple[fx.Node, list[str]]] = []  # names: the traced graph loses nodes when it is cleaned up
        self.parts: dict[fx.Node, Any] = {}
        self.bodies: list[Body] = []
        self.autocasts = autocasts()
        self.off: list[tuple[fx.Node, list[str]]] = []

    def run_node(self, n: fx.Node) -> Any:
        last, off = self._last(), not torch.is_grad_enabled()
        result = self._run(n)
        made = torch_private.traced_node(result)
        if n.op == "call_function" and isinstance(result, torch.Tensor) and _leaves_transform(n):
            result = torch_private.like(n.meta["example_value"])
            made = torch_private.traced_node(result)
        if made is not None and n.op != "output":
            self.pairs.append((made, n))
        if isinstance(result, tuple | list):
            self.parts[n] = [torch_private.traced_node(x) for x in result]
        self.made.append((n, self._since(last)))
        self.off += self.made[-1:] if off else []
        return result

    def _run(self, n: fx.Node) -> Any:
        if isinstance(n.target, HigherOrderOperator) and n.target is not FLEX:
            return self._opaque(n)
        if crosses(n):
            return torch_private.like(n.meta["example_value"])
        number = known_number(n)
        if number is not None:
            return number
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.target is torch_private.ENTER_AUTOCAST:
            region = torch_private.enter_autocast(*args)
            self.autocasts = self.autocasts or autocasts()
            return region
        if n.target is torch_private.EXIT_AUTOCAST:
            return torch_private.exit_autocast(*args)
        written_out = in_place_of(n, args)
        if written_out is not None:
            return written_out(*args, **kwargs)
        if n.target is FLEX:  # its graph of gradients is not read, and cannot be traced twice
            with torch_private.gradients_off():
                return FLEX(*without_items(args), **kwargs)
        if "example_value" in n.meta and (torch_private.inside_transform() or n.target is torch_private.AUTOGRAD_GRAD):
            return self._transformed(n)
        if self.repeats is None:
            return super().run_node(n)
        return self.repeats.run(n, args, kwargs, lambda: super(_Shadow, self).run_node(n))

    def _transformed(self, n: fx.Node) -> Any:
        """A node inside a transform of `torch.func`, whose tensors a trace does not show and may fail on (a gradient of
        a product with a number): new tensors then, as nothing is found there in any case."""
        try:
            return super().run_node(n)
        except Exception:
            return tree_map_only(torch.Tensor, torch_private.like, n.meta["example_value"])

    def _opaque(self, n: fx.Node) -> Any:
        """New tensors for what a higher-order operator gives. Bodies that it has of its own are read by themselves."""
        args, _ = self.fetch_args_kwargs_from_env(n)
        if str(n.target) == "register_hook":
            return hooked(args[0])
        if str(n.target) in _WITH_BODIES:
            for body in (x for x in args if isinstance(x, fx.GraphModule)):
                given = [p.meta.get("example_value") for p in body.graph.find_nodes(op="placeholder")]
                if all(x is not None for x in given):
                    self.bodies.append(Body(body, given, modes()))
            return _results(n, args)
        first = next((at for at, x in enumerate(args) if isinstance(x, fx.GraphModule)), len(args))
        bodies = [x for x in args[first:] if isinstance(x, fx.GraphModule)]
        if str(n.target) == "autograd_function_apply":  # its backward takes other arguments
            bodies = bodies[:1]
        given = [x for x in args[first:] if not isinstance(x, fx.GraphModule | str)]
        if len(bodies) == 1 and len(given) == sum(p.op == "placeholder" for p in bodies[0].graph.nodes):
            self.bodies.append(Body(bodies[0], given, modes()))
        return _results(n, given)

    def _last(self) -> fx.Node | None:
        mode = torch_private.get_proxy_mode()
        return None if mode is None else next(iter(reversed(mode.tracer.graph.nodes)), None)

    def _since(self, last: fx.Node | None) -> list[str]:
        end = self._last()
        names: list[str] = []
        while end is not None and end is not last and end.op != "root":
            names.append(end.name)
            end = end.prev
        return names[::-1]


def read(module: fx.GraphModule, inputs: Sequence[Any]) -> Reading:
    """The shadow of a Dynamo graph. Raises whatever the trace raises; the module itself is not touched."""
    own = torch_private.fakes_of_dynamo(module, inputs)
    mode, fakes = own or torch_private.fake_inputs(inputs)
    shadow = _Shadow(module, None if own is None else Repeats())
    # Grad mode is part of what Dynamo captured, and a trace under no_grad records less.
    with torch.enable_grad() if torch.is_grad_enabled() else torch.no_grad():
        traced = torch_private.trace(lambda *a: shadow.run(*a), mode, fakes)
    names = {n.name: n for n in traced.graph.nodes}
    reading = Reading(module.graph, traced, {}, bodies=shadow.bodies, autocasts=shadow.autocasts)
    for made, node in shadow.pairs:
        found = names.get(made.name)
        if found is not None:
            reading.origin.setdefault(found, node)
    for node, made in shadow.made:
        reading.owner |= {names[name]: node for name in made if name in names}
    for node, parts in shadow.parts.items():
        reading.results[node] = [None if p is None else names.get(p.name) for p in parts]
    reading.off = frozenset(x for n, made in shadow.off for x in (n, *(names[name] for name in made if name in names)))
    given = [n for n in traced.graph.nodes if n.op == "placeholder"]
    wanted = dict(zip(given, inputs, strict=False))
    reading.graded = frozenset(n for n in traced.graph.nodes if _requires_grad(reading, n, wanted.get(n)))
    return reading


def _results(n: fx.Node, given: Sequence[Any]) -> Any:
    """New tensors for what a higher-order operator gives, computed from those it is given. What has no gradients where
    those have some is as if it were computed from nothing."""
    plain = not torch_private.inside_transform()
    values = (a.meta.get("example_value") for a in n.all_input_nodes)
    graded = torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in values)
    tensors = [x for x in tree_leaves(given) if plain and torch_private.traced_node(x) is not None]
    tensors = [x for x in tensors if isinstance(x, torch.Tensor)]

    def result(x: torch.Tensor) -> torch.Tensor:
        made = torch_private.like(x)
        follows = tensors and (x.requires_grad or not graded)
        return given_by(str(n.target), made, tensors) if follows else made

    return tree_map_only(torch.Tensor, result, n.meta["example_value"])


def _leaves_transform(n: fx.Node) -> bool:
    """Whether a node takes a tensor out of a transform of `torch.func`. It is one that the graph outside may use, as
    none inside is, whatever a trace makes of it."""
    return getattr(n.target, "__name__", "") in ("_unwrap_for_grad", "_remove_batch_dim")


def _requires_grad(reading: Reading, n: fx.Node, given: Any) -> bool:
    """Whether a node of the shadow is an input, or stands for what a higher-order operator gives, that gradients are
    wanted of."""
    if n.op == "call_function" and not (n.target is torch.ops.aten.empty_strided.default or is_given(n)):
        return False
    origin = reading.origin.get(n)
    value = given if origin is None else origin.meta.get("example_value", given)
    if n.op == "get_attr" and value is None:
        value = getattr(reading.shadow, str(n.target), None)
    return isinstance(value, torch.Tensor) and value.requires_grad
