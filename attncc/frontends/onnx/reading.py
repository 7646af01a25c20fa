"""ONNX files as graphs: read, and looked over before anything is made of them.

A file comes from anywhere. Sizes that it claims are compared with the bytes that are there, data beside the file has to
lie in its folder, and a graph has to be one: each value made once, before it is used, without a cycle.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


def constants(model: ir.Model) -> dict[str, Any]:
    """The data of a graph by the names of its values."""
    found = {name: v.const_value for name, v in model.graph.initializers.items() if v.const_value is not None}
    for node in model.graph:
        if node.op_type == "Constant" and node.domain in STANDARD and "value" in node.attributes:
            found[str(node.outputs[0].name)] = node.attributes["value"].as_tensor()
    return found


def _check(model: ir.Model, path: Path) -> None:
    opset = opset_of(model)
    if opset not in OPSETS:
        raise TargetError(f"{path}: written for opset {opset}; those from {OPSETS[0]} to {OPSETS[-1]} are known")
    known: set[Any] = {*model.graph.inputs, *model.graph.initializers.values()}
    ordered = True
    for n, node in enumerate(model.graph):
        if n > MOST_NODES:
            raise TargetError(f"{path}: holds more than {MOST_NODES} nodes")
        texts = node.op_type, node.domain, *(x.name for x in (*node.inputs, *node.outputs) if x is not None)
        if not all(isinstance(t, str | None) for t in texts):
            raise TargetError(f"{path}: a node holds names that are no text")
        ordered = ordered and all(x is None or x in known for x in node.inputs)
        known.update(node.outputs)
    if not ordered:
        try:
            model.graph.sort()
        except ValueError as error:
            raise TargetError(f"{path}: the graph has a cycle") from error
    for node in model.graph:
        for x in node.inputs:
            if x is not None and x not in known:
                where = node.name or node.op_type
                raise TargetError(f"{path}: the node {where!r} reads {x.name!r}, which nothing makes")
    for x in model.graph.outputs:
        if x is None or x not in known:
            raise TargetError(f"{path}: nothing makes the output {getattr(x, 'name', '')!r}")
    for x in model.graph.inputs:
        if x.dtype is None or x.shape is None:
            raise TargetError(f"{path}: the input {x.name!r} has no type and shape")
        known_extents = [n for n in x.shape if isinstance(n, int)]
        if any(n < 0 for n in known_extents) or math.prod(known_extents) > MOST_ELEMENTS:
            raise TargetError(f"{path}: the input {x.name!r} has the shape {list(known_extents)}")


def _check_functions(model: ir.Model, path: Path) -> None:
    """No function calls itself, and inlined they stay within bounds."""
    sizes: dict[Any, int] = {}
    open_: set[Any] = set()

    def size(key: Any) -> int:
        if key not in sizes:
            if key in open_ or len(open_) > 64:
                raise TargetError(f"{path}: the function {key[1]!r} calls itself")
            open_.add(key)
            sizes[key] = 1 + sum(
                size(n.op_identifier()) if n.op_identifier() in model.functions else 1 for n in model.functions[key]
            )
            open_.discard(key)
        return sizes[key]

    total = sum(size(n.op_identifier()) for n in model.graph if n.op_identifier() in model.functions)
    if total > MOST_NODES:
        raise TargetError(f"{path}: its functions make more than {MOST_NODES} nodes")


def _check_data(model: ir.Model, path: Path) -> None:
    """Data is where it may be, and as much as its shape says."""
    import onnx_ir as ir  # noqa: PLC0415

    folder = path.parent.resolve()
    for name, x in constants(model).items():
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


def _check_proto(x: Any, name: str, wanted: int, path: Path) -> None:
    raw = x.raw
    held = len(raw.raw_data)
    if not raw.HasField("raw_data"):
        fields = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")
        count = sum(len(getattr(raw, f)) for f in fields)
        held = wanted if count * max(8, x.dtype.bitwidth) >= wanted * 8 or x.dtype.name == "STRING" else count
    if held < wanted:
        raise TargetError(f"{path}: {name!r} says it holds {wanted} bytes and holds {held}")
