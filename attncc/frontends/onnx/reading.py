"""ONNX files as graphs: read, and looked over before anything is made of them.

A file comes from anywhere. Sizes that it claims are compared with the bytes that are there, data beside the file has to
lie in its folder, and a graph has to be one: each value made once, before it is used, without a cycle.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attncc.frontends.onnx.control import captured, graphs_of
from attncc.frontends.targets import TargetError, one_line

if TYPE_CHECKING:
    import onnx_ir as ir

#: The versions of the standard operators that the rows are written for.
OPSETS = range(7, 28)
STANDARD = ("", "ai.onnx")
#: More nodes than any model has: functions inlined into each other can make as many as they like.
MOST_NODES = 1_000_000
#: More elements than any input has.
MOST_ELEMENTS = 1 << 32


def read(path: str | Path) -> ir.Model:
    """The model of a file, its functions inlined. Raises TargetError, in one line that says what is wrong."""
    path = Path(path)
    try:
        import onnx_ir as ir  # noqa: PLC0415 an extra
    except ImportError as error:
        raise TargetError(f"{path}: reading ONNX needs onnx-ir; pip install 'attncc[onnx]'") from error
    if not path.is_file():
        raise TargetError(f"{path}: no such file")
    try:
        model = ir.load(path)
        _check_data(model, path)
        _check_functions(model, path)
        if model.functions:
            from onnx_ir.passes.common import InlinePass  # noqa: PLC0415 as above

            InlinePass()(model)
        _check(model, path)
    except TargetError:
        raise
    except (Exception, RecursionError) as error:
        raise TargetError(f"{path}: not a whole ONNX model ({one_line(error)})") from error
    return model


def opset_of(model: ir.Model) -> int:
    """The version of the standard operators."""
    return next((v for d, v in model.opset_imports.items() if d in STANDARD), 0)


def every_graph(model: ir.Model) -> Iterator[ir.Graph]:
    """The graph of a model, and those that its nodes hold."""
    return _graphs_in(model.graph)


def _graphs_in(outer: Any) -> Iterator[Any]:
    """A graph or a function, and the graphs that its nodes hold."""
    open_ = [outer]
    while open_:
        graph = open_.pop()
        yield graph
        open_ += [g for node in graph for g in graphs_of(node).values()]


def every_node(model: ir.Model) -> Iterator[ir.Node]:
    return (node for graph in every_graph(model) for node in graph)


def constant_values(model: ir.Model) -> dict[str, ir.Value]:
    """What holds data in the graphs of a model, by name: initializers, and the outputs of `Constant`."""
    found: dict[str, ir.Value] = {}
    for graph in every_graph(model):
        found |= {str(name): v for name, v in graph.initializers.items() if v.const_value is not None}
        found |= {str(node.outputs[0].name): node.outputs[0] for node in graph if _holds_data(node)}
    return found


def constants(model: ir.Model) -> dict[str, Any]:
    """The data of a model by the names of its values."""
    found: dict[str, Any] = {}
    for name, v in constant_values(model).items():
        node = v.producer()
        found[name] = v.const_value if node is None else node.attributes["value"].as_tensor()
    return found


def _holds_data(node: ir.Node) -> bool:
    return node.op_type == "Constant" and node.domain in STANDARD and "value" in node.attributes


def scales(model: ir.Model) -> set[str]:
    """The names of what says by how much something is resized, and nothing else: numbers, no layers."""
    read: dict[str, bool] = {}
    for node in every_node(model):
        for at, x in enumerate(node.inputs):
            if x is not None:
                plain = node.op_type in ("Resize", "Upsample") and at > 0
                read[str(x.name)] = plain and read.get(str(x.name), True)
    return {name for name, plain in read.items() if plain}


def _check(model: ir.Model, path: Path) -> None:
    opset = opset_of(model)
    if opset not in OPSETS:
        raise TargetError(f"{path}: written for opset {opset}; those from {OPSETS[0]} to {OPSETS[-1]} are known")
    if sum(1 for _ in islice(every_node(model), MOST_NODES + 1)) > MOST_NODES:
        raise TargetError(f"{path}: holds more than {MOST_NODES} nodes")
    _check_graph(model.graph, frozenset(), path)
    for x in model.graph.inputs:
        if x.dtype is None or x.shape is None:
            raise TargetError(f"{path}: the input {x.name!r} has no type and shape")
        known_extents = [n for n in x.shape if isinstance(n, int)]
        if any(n < 0 for n in known_extents) or math.prod(known_extents) > MOST_ELEMENTS:
            raise TargetError(f"{path}: the input {x.name!r} has the shape {list(known_extents)}")


def _check_graph(graph: ir.Graph, around: frozenset[Any], path: Path) -> None:
    """Each value is made once, before it is used; those of the graphs around may be used too."""
    known: set[Any] = {*around, *graph.inputs, *graph.initializers.values()}
    ordered = True
    for node in graph:
        texts = node.op_type, node.domain, *(x.name for x in (*node.inputs, *node.outputs) if x is not None)
        if not all(isinstance(t, str | None) for t in texts):
            raise TargetError(f"{path}: a node holds names that are no text")
        ordered = ordered and all(x is None or x in known for x in (*node.inputs, *_captured(node)))
        known.update(node.outputs)
    if not ordered:
        try:
            graph.sort()
        except ValueError as error:
            raise TargetError(f"{path}: the graph has a cycle") from error
    for node in graph:
        for x in (*node.inputs, *_captured(node)):
            if x is not None and x not in known:
                where = node.name or node.op_type
                raise TargetError(f"{path}: the node {where!r} reads {x.name!r}, which nothing makes")
        for inner in graphs_of(node).values():
            _check_graph(inner, frozenset(known), path)
    for x in graph.outputs:
        if x is None or x not in known:
            raise TargetError(f"{path}: nothing makes the output {getattr(x, 'name', '')!r}")


def _captured(node: ir.Node) -> list[ir.Value]:
    return [x for g in graphs_of(node).values() for x in captured(g)]


def _check_functions(model: ir.Model, path: Path) -> None:
    """No function calls itself, and inlined they stay within bounds."""
    sizes: dict[Any, int] = {}
    open_: set[Any] = set()

    def size(key: Any) -> int:
        if key not in sizes:
            if key in open_ or len(open_) > 64:
                raise TargetError(f"{path}: the function {key[1]!r} calls itself")
            open_.add(key)
            nodes = (n for g in _graphs_in(model.functions[key]) for n in g)
            sizes[key] = 1 + sum(size(n.op_identifier()) if n.op_identifier() in model.functions else 1 for n in nodes)
            open_.discard(key)
        return sizes[key]

    total = sum(size(n.op_identifier()) for n in every_node(model) if n.op_identifier() in model.functions)
    if total > MOST_NODES:
        raise TargetError(f"{path}: its functions make more than {MOST_NODES} nodes")


def _check_data(model: ir.Model, path: Path) -> None:
    """Data is where it may be, and as much as its shape says."""
    import onnx_ir as ir  # noqa: PLC0415

    folder = path.parent.resolve()
    for name, x in _every_tensor(model):
        wanted = math.ceil(math.prod(map(int, x.shape)) * x.dtype.bitwidth / 8) if x.dtype.bitwidth else 0
        if any(int(n) < 0 for n in x.shape):
            raise TargetError(f"{path}: the shape of {name!r} has a negative extent")
        if isinstance(x, ir.ExternalTensor):
            file = (folder / x.location).resolve()
            if not file.is_relative_to(folder):
                raise TargetError(f"{path}: the data of {name!r} lies outside of its folder, at {x.location!r}")
            if not file.is_file():
                raise TargetError(f"{path}: the data of {name!r} should be in {x.location!r}, which is no file")
            start, length = x.offset or 0, wanted if x.length is None else x.length
            if start < 0 or length < wanted or start + wanted > file.stat().st_size:
                raise TargetError(f"{path}: {x.location!r} does not hold all {wanted} bytes of {name!r}")
        elif isinstance(x, ir.TensorProtoTensor):
            _check_proto(x, name, wanted, path)


def _every_tensor(model: ir.Model) -> Iterator[tuple[str, Any]]:
    """All data of a model, that of attributes and of functions too, with what to call it."""
    import onnx_ir as ir  # noqa: PLC0415

    for graph in every_graph(model):
        yield from ((str(name), v.const_value) for name, v in graph.initializers.items() if v.const_value is not None)
    for outer in (model.graph, *model.functions.values()):
        for node in (n for g in _graphs_in(outer) for n in g):
            for name, a in node.attributes.items():
                called = str(node.outputs[0].name) if node.op_type == "Constant" and node.outputs else name
                if a.type == ir.AttributeType.TENSOR and not a.is_ref():
                    yield called, a.as_tensor()
                elif a.type == ir.AttributeType.TENSORS and not a.is_ref():
                    yield from ((called, x) for x in a.as_tensors())


def _check_proto(x: Any, name: str, wanted: int, path: Path) -> None:
    raw = x.raw
    held = len(raw.raw_data)
    if not raw.HasField("raw_data"):
        fields = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")
        count = sum(len(getattr(raw, f)) for f in fields)
        held = wanted if count * max(8, x.dtype.bitwidth) >= wanted * 8 or x.dtype.name == "STRING" else count
    if held < wanted or (raw.HasField("raw_data") and held != wanted):
        raise TargetError(f"{path}: {name!r} says it holds {wanted} bytes and holds {held}")
