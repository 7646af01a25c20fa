"""What attentions of an ONNX graph read, as values that nodes can be made of; and new nodes in the place of theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch import fx

from attncc.codegen.onnx import Inexpressible, Nodes, Value
from attncc.codegen.onnx.linear import linear
from attncc.codegen.onnx.scanned import scanned
from attncc.convert.onnx_graphs import visible
from attncc.convert.onnx_recurrence import step_of
from attncc.convert.onnx_tracing import Traced
from attncc.frontends.onnx.reading import opset_of
from attncc.frontends.onnx.values import DTYPES
from attncc.ir import Const, Expr, Linear, Size, Tensor
from attncc.ir.evaluate import DTYPE_OF, int_value
from attncc.ir.expr import free
from attncc.patterns.linear.linear import Recognised, Result

if TYPE_CHECKING:
    from attncc.patterns.graph.facts import Facts


@dataclass(frozen=True)
class Exchange:
    """A model, its trace, and the nodes that are made for one site after the other. `shared` is what sites of a graph
    share, and makes its nodes where it is used."""

    model: ir.Model
    traced: Traced
    facts: Facts
    nodes: Nodes = field(default_factory=lambda: Nodes("attncc"))
    shared: dict[ir.Graph, dict[object, Value]] = field(default_factory=dict)

    def begin(self, prefix: str, old: ir.Value | None) -> None:
        """Begin the nodes of a site whose value is `old`."""
        producer = None if old is None else old.producer()
        graph = self.model.graph if producer is None or not isinstance(producer.graph, ir.Graph) else producer.graph
        self.nodes.prefix, self.nodes.made, self.nodes.shared = prefix, [], self.shared.setdefault(graph, {})

    def given(
        self, tensors: Sequence[Tensor], held: Sequence[fx.Node], dtypes: Sequence[torch.dtype],
        spelled: Mapping[Size, Expr],
    ) -> tuple[dict[str, Value], dict[Expr, Any]]:  # fmt: skip
        """(values of tensors by name, extents of sizes). `spelled` are the sizes over the graph's symbols. Raises
        Inexpressible."""
        nodes = self.nodes
        values: dict[str, Value] = {}
        sizes: dict[Expr, Any] = {}
        for t, n, dtype in zip(tensors, held, dtypes, strict=True):
            extents = tuple(int(x.value) if isinstance(x, Const) else None for x in t.shape)
            value = self.held(n, extents).to(dtype)
            for at, x in enumerate(t.shape):
                if isinstance(x, Size) and x not in sizes:
                    key = "size", spelled[x]
                    known = nodes.shared[key] = nodes.shared.get(key) or value.extent(at)
                    sizes[x] = Value(nodes, known.value, known.dtype, known.shape)
            values[t.name] = Value(
                nodes, value.value, value.dtype,
                tuple(sizes[x] if isinstance(x, Size) else e for x, e in zip(t.shape, extents, strict=True)),
            )  # fmt: skip
        for x, how in spelled.items():
            if x not in sizes:
                sizes[x] = self.computed(how)
        return values, sizes

    def held(self, n: fx.Node, extents: tuple[Any, ...]) -> Value:
        """What a node of the trace holds; nodes that the reader made beside it, of those of the trace."""
        held = self.traced.values.get(n)
        if held is not None:
            own = DTYPES.get(int(held.dtype)) if held.dtype is not None else None
            return Value(self.nodes, held, n.meta["val"].dtype if own is None else own, extents)
        if n.target is torch.ops.aten.to.dtype:
            return self.held(n.all_input_nodes[0], extents).to(n.args[1])  # type: ignore[arg-type]
        raise Inexpressible(f"it reads what is inside of a node ({n.target})")

    def computed(self, size: Expr) -> Any:
        """A size that no tensor at hand has, from the extents of the model's inputs."""
        table: dict[Expr, Any] = {}
        for symbol in free(size):
            for n in self.traced.graph.find_nodes(op="placeholder"):
                shape = self.facts.shape(n)
                if symbol in shape and symbol not in table and n in self.traced.values:
                    value = Value(self.nodes, self.traced.values[n], n.meta["val"].dtype, (None,) * len(shape))
                    table[symbol] = value.extent(shape.index(symbol))
        try:
            return int_value(size, table)
        except (KeyError, TypeError) as error:
            raise Inexpressible("one of its sizes is no extent of what it reads") from error

    def put(self, pairs: Sequence[tuple[ir.Value, Value]]) -> None:
        """Put the nodes that were made into the graph, with a new value in the place of each old one. Raises
        Inexpressible where they read what that graph does not see."""
        made, prefix = self.nodes.made, self.nodes.prefix
        ends: list[tuple[ir.Value, ir.Value]] = []
        for old, new in pairs:
            out = new.value
            if out.producer() not in made or out in [x for _, x in ends]:
                made.append(ir.node("Identity", [out], name=f"{prefix}/Identity_{len(made)}"))
                out = made[-1].outputs[0]
            ends.append((old, out))
        producer = pairs[0][0].producer()
        assert producer is not None
        graph = producer.graph
        assert isinstance(graph, ir.Graph)  # it was run
        if not visible(self.model, made, graph):
            raise Inexpressible("it reads what is inside of another graph of the file")
        graph.insert_before(producer, made)
        for n, (old, out) in enumerate(ends):
            name, shape, dtype = old.name, old.shape, old.dtype
            old.name = f"{prefix}/replaced_{n}"
            out.name, out.shape = name, shape
            if dtype is not None:
                out.dtype = dtype
            ir.convenience.replace_all_uses_with(old, out, replace_graph_outputs=True)


def linear_rewritten(exchange: Exchange, site: Recognised, domain: str, opset: int) -> str:
    """Why a linear attention stays as it is; nothing where it became the operator."""
    results = site.results or (Result(site.node, "out", site.axes),)
    olds = [exchange.traced.values.get(r.node) for r in results]
    a = replace(site.linear, outputs=tuple(x for x in ("out", "state") if any(r.output == x for r in results)))
    known = dict(exchange.nodes.shared)
    try:
        if any(x is None or x.producer() is None for x in olds):
            raise Inexpressible("its output is inside of a node")
        values, sizes = exchange.given(
            a.tensors, site.tensors, [DTYPE_OF[t.dtype] for t in a.tensors], dict(zip(a.sizes, site.sizes, strict=True))
        )
        extents: dict[Size, Any] = {x: sizes[x] for x in a.sizes}
        found = linear(a, [values[t.name] for t in a.tensors], extents, domain=domain, opset=opset)
        made = [_as_result(a, r, found[r.output], exchange.facts) for r in results]
        exchange.put([(old, new) for old, new in zip(olds, made, strict=True) if old is not None])
    except (Inexpressible, NotImplementedError) as error:
        exchange.nodes.shared.clear()
        exchange.nodes.shared.update(known)
        return str(error)
    return ""


def _as_result(a: Linear, r: Result, value: Value, facts: Facts) -> Value:
    """An output as the model has it: its axes in the model's order, its dtype."""
    rows, columns = (a.i, a.e) if r.output == "out" else (a.d, a.e)
    axes = [*a.batch, rows, columns]
    if r.row is not None:
        value = value.select(len(axes) - 2, r.row)
        axes.remove(rows)
    like = facts.value(r.node)
    names = [x.name for x in axes]
    for at, name in enumerate(r.axes):
        extent = axes[names.index(name)].extent if name else Const(1)
        if isinstance(extent, Const) and isinstance(like.shape[at], int) and like.shape[at] != int(extent.value):
            raise Inexpressible("its rows are more than those of the model's result")
    value = value.permute([names.index(n) for n in r.axes if n])
    for at, name in enumerate(r.axes):
        value = value if name else value.unsqueeze(at)
    return value.to(facts.dtype(r.node))


def recurrence_rewritten(exchange: Exchange, node: ir.Node, domain: str, opset: int) -> tuple[str, str]:
    """(the equation of a `Scan` that is a linear attention over its turns, why it stays as it is): the latter is empty
    where it became the operator."""
    turn = exchange.traced.scans.get(node)
    step = "its turns are not read" if turn is None else step_of(node, turn, opset_of(exchange.model))
    if isinstance(step, str) or turn is None:
        return "", str(step)
    known = dict(exchange.nodes.shared)
    try:
        first, *scans = node.inputs
        state = _value(exchange, first, turn.states[0])
        along = [_value(exchange, x, y, at) for x, y, at in zip(scans, turn.along, turn.axes, strict=True)]
        state = state.permute(0, 1, 3, 2) if step.turned else state
        decay, rate = (None if n is None else along[n] for n in (step.decay, step.rate))
        out, last = scanned(along[step.q], along[step.k], along[step.v], state, decay, rate, rule=step.rule,
                            scale=step.scale, domain=domain, opset=opset)  # fmt: skip
        order = [1, 2, 3]
        order.insert(turn.out_axes[0], 0)
        made = (last.permute(0, 1, 3, 2) if step.turned else last), out.permute(*order)
        exchange.put(
            [(old, new.to(dtype)) for old, new, dtype in zip(node.outputs, made, step.dtypes, strict=True)]
        )  # fmt: skip
    except (Inexpressible, NotImplementedError) as error:
        exchange.nodes.shared.clear()
        exchange.nodes.shared.update(known)
        return step.equation, str(error)
    return step.equation, ""


def _value(exchange: Exchange, held: ir.Value | None, fake: torch.Tensor, axis: int | None = None) -> Value:
    """An input of a `Scan`; of one that is scanned along an axis, `fake` is the part of a turn, and the turns come
    first."""
    extents: list[Any] = [n if type(n) is int else None for n in fake.shape]
    if axis is not None:
        extents.insert(axis, None)
    assert held is not None
    value = Value(exchange.nodes, held, fake.dtype, tuple(extents))
    value = Value(exchange.nodes, held, fake.dtype, tuple(value.extent(at) for at in range(len(extents))))
    if axis is None:
        return value
    value = value.permute([axis, *(n for n in range(len(extents)) if n != axis)])
    return value if value.ndim == 4 else value.unsqueeze(3)
