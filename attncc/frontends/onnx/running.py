"""Running an ONNX graph in torch, node by node."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from attncc.frontends.onnx import layers, pointwise, shapes
from attncc.frontends.onnx.control import Control, captured, graphs_of, run_control
from attncc.frontends.onnx.reading import STANDARD, constants, every_node, opset_of, scales
from attncc.frontends.onnx.values import DTYPES, Unsupported, of_constant, tensor
from attncc.frontends.targets import TargetError, one_line

if TYPE_CHECKING:
    import onnx_ir as ir

#: What each operator of ONNX is in torch, by its name.
ROWS: dict[str, Callable[..., Any]] = {**pointwise.ROWS, **shapes.ROWS, **layers.ROWS}
#: Those that hold graphs.
CONTROL = ("If", "Loop", "Scan")
#: So many more nodes are run than a file holds: loops inside of loops, written out, can make as many as they like.
MOST_MORE = 10_000


@cache
def _wants(op: str) -> frozenset[str]:
    """Which of `opset` and `outputs` a row asks for."""
    parameters = inspect.signature(ROWS[op]).parameters
    return frozenset(
        name for name in ("opset", "outputs") if name in parameters or (name == "opset" and op == "LogSoftmax")
    )


def missing(model: ir.Model) -> list[str]:
    """The operators of a model that have no row, once each."""
    return list(dict.fromkeys(
        f"{n.domain}::{n.op_type}" if n.domain else n.op_type
        for n in every_node(model) if n.domain not in STANDARD or n.op_type not in (*ROWS, *CONTROL)
    ))  # fmt: skip


def attributes(node: ir.Node) -> dict[str, Any]:
    """The attributes of a node as Python values; tensors as torch's. Raises Unsupported for graphs and the like."""
    import onnx_ir as ir  # noqa: PLC0415 an extra

    found: dict[str, Any] = {}
    for name, a in node.attributes.items():
        if a.type == ir.AttributeType.TENSOR:
            found[name] = of_data(a.as_tensor())
        elif a.type in (ir.AttributeType.INT, ir.AttributeType.FLOAT, ir.AttributeType.STRING, ir.AttributeType.INTS,
                        ir.AttributeType.FLOATS):  # fmt: skip
            found[name] = list(a.value) if isinstance(a.value, tuple) else a.value
        else:
            raise Unsupported(f"with the attribute {name!r}, which is a {a.type.name.lower()}")
    return found


def of_data(x: Any) -> torch.Tensor:
    """A tensor of a file. Raises Unsupported for element types that torch has not."""
    dtype = DTYPES.get(int(x.dtype))
    if dtype is None:
        raise Unsupported(f"of {x.dtype.name.lower()} data")
    try:
        data = x.numpy()
    except Exception as error:
        raise Unsupported(f"which cannot be read ({one_line(error)})") from error
    if dtype == torch.bfloat16:
        return torch.from_numpy(data.view("int16").copy()).view(torch.bfloat16)
    return torch.from_numpy(data if data.flags.writeable else data.copy())


def run_node(node: ir.Node, given: Sequence[Any], opset: int) -> tuple[Any, ...]:
    """What a node gives for values. Raises TargetError where it has no row, or the row cannot."""
    where = f"the node {node.name or node.op_type!r} ({node.op_type})"
    if node.domain not in STANDARD or node.op_type not in ROWS:
        raise TargetError(f"{where} is of an operator that is not known here{_of_domain(node)}")
    extra = {"opset": opset, "outputs": len(node.outputs)}
    try:
        how = {**attributes(node), **{name: extra[name] for name in _wants(node.op_type)}}
        if node.op_type in _AXES and "axes" in how:  # an attribute before it was an input
            given = [given[0], how.pop("axes"), *given[2:]]
        made = ROWS[node.op_type](*given, **how)
    except Unsupported as error:
        raise TargetError(f"{where}: {error}") from error
    except TargetError:
        raise
    except Exception as error:
        raise TargetError(f"{where}: {one_line(error)}") from error
    return made if isinstance(made, tuple) else (made,)


_AXES = ("Squeeze", "Unsqueeze", *(name for name in ROWS if name.startswith("Reduce")))


def _of_domain(node: ir.Node) -> str:
    return f" (of the domain {node.domain!r})" if node.domain not in STANDARD else ""


@dataclass(frozen=True)
class Running:
    """A run of a model. `data` are its constants by name; `seen` is called with each value that is made; `control` says
    what nodes give that hold graphs."""

    opset: int
    data: Mapping[str, Any]
    seen: Callable[[ir.Value, Any], object] = lambda value, x: None
    control: Control = run_control
    left: list[int] = field(default_factory=lambda: [MOST_MORE])

    def graph(self, graph: ir.Graph, inputs: Sequence[Any], around: Mapping[Any, Any]) -> list[Any]:
        """The outputs of a graph for its inputs and what is known around it. Values are dropped after their last
        use."""
        known = {None: None, **around}
        known.update((v, self.data[name]) for name, v in graph.initializers.items())
        free = [v for v in graph.inputs if v.name not in graph.initializers]
        known.update(zip(free, inputs, strict=True))
        for v, x in zip(free, inputs, strict=True):
            self.seen(v, x)
        reads = {node: _read(node) for node in graph}
        last = {x: node for node, read in reads.items() for x in read}
        kept = {*graph.outputs, None}
        for node, read in reads.items():
            for v, x in zip(node.outputs, self._node(node, known), strict=False):
                known[v] = x
                self.seen(v, x)
            for x in read:
                if x not in kept and last.get(x) is node:
                    del known[x]
        return [known[v] for v in graph.outputs]

    def _node(self, node: ir.Node, known: Mapping[Any, Any]) -> tuple[Any, ...]:
        self.left[0] -= 1
        if self.left[0] < 0:
            raise TargetError("its loops inside of loops are too many to be written out")
        if node.op_type == "Constant" and node.outputs[0].name in self.data:
            return (self.data[str(node.outputs[0].name)],)
        given = [known[x] for x in node.inputs]
        if node.op_type not in CONTROL or node.domain not in STANDARD:
            return run_node(node, given, self.opset)
        try:
            return self.control(self.graph, node, given, known)
        except TargetError:
            raise
        except Exception as error:
            why = f"it {error}" if isinstance(error, Unsupported) else one_line(error)
            raise TargetError(f"the node {node.name or node.op_type!r} ({node.op_type}): {why}") from error


def _read(node: ir.Node) -> set[ir.Value]:
    """What a node reads, the graphs that it holds included."""
    inner = [x for g in graphs_of(node).values() for x in captured(g)] if node.op_type in CONTROL else []
    return {*(x for x in node.inputs if x is not None), *inner}


def run(
    model: ir.Model, inputs: Mapping[str, Any], data: Mapping[str, Any],
    seen: Callable[[ir.Value, Any], object] = lambda value, x: None, control: Control = run_control,
) -> list[torch.Tensor]:  # fmt: skip
    """The outputs of a model (`Running`)."""
    free = [inputs[str(v.name)] for v in model.graph.inputs if v.name not in model.graph.initializers]
    most = MOST_MORE + 2 * sum(1 for _ in every_node(model))
    return [tensor(x) for x in Running(opset_of(model), data, seen, control, [most]).graph(model.graph, free, {})]


class OnnxModule(torch.nn.Module):
    """A graph as a module: its arguments are the graph's inputs in order, its result is the tuple of the outputs. What
    has floats and dimensions is a parameter."""

    def __init__(self, model: ir.Model) -> None:
        super().__init__()
        self.model = model
        self.names = [str(v.name) for v in model.graph.inputs if v.name not in model.graph.initializers]
        self.places: dict[str, str] = {}
        self.numbers: dict[str, Any] = {}
        plain = scales(model)
        for at, (name, x) in enumerate(constants(model).items()):
            value = of_constant(of_data(x), name in plain)
            if not isinstance(value, torch.Tensor):
                self.numbers[name] = value
                continue
            self.places[name] = f"c{at}"
            if value.is_floating_point():
                self.register_parameter(f"c{at}", torch.nn.Parameter(value, requires_grad=False))
            else:
                self.register_buffer(f"c{at}", value)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        data = {name: getattr(self, place) for name, place in self.places.items()} | self.numbers
        return tuple(run(self.model, dict(zip(self.names, inputs, strict=True)), data))
