"""An ONNX graph as the reader wants it: traced in torch on fake tensors, each traced node with the value it holds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from attncc import torch_private
from attncc.convert.constant_masks import spelled
from attncc.convert.onnx_inlining import Inlined, Turn
from attncc.frontends.onnx.reading import constant_values, constants, scales
from attncc.frontends.onnx.running import of_data, run
from attncc.frontends.onnx.values import DTYPES, Unsupported, of_constant
from attncc.frontends.targets import TargetError
from attncc.patterns.graph.facts import Facts

if TYPE_CHECKING:
    import onnx_ir as ir

#: What open dimensions are made, each another number, as equal ones are taken for the same: 2 and more, and even.
_FIRST, _STEP = 6, 4
#: More data than this is no mask.
_MOST_MASK = 1 << 26


@dataclass
class Traced:
    """The trace of a graph, and the value of the graph that each of its nodes holds."""

    graph: fx.Graph
    values: dict[fx.Node, ir.Value] = field(default_factory=dict)
    parameters: frozenset[fx.Node] = frozenset()
    scans: Mapping[ir.Node, Turn] = field(default_factory=dict["ir.Node", Turn])

    def within(self, n: fx.Node) -> ir.Node | None:
        """The node of the graph that a traced node was made in."""
        at = n
        while at.op != "output" and at not in self.values:
            at = at.next
        return None if at.op == "output" else self.values[at].producer()

    def facts(self) -> Facts:
        found = Facts(self.graph, {}, self.parameters)
        found.tables = False  # a node of ONNX reads a bias of all pairs, which the graph has
        return found


def sizes_of(model: ir.Model, asked: Mapping[str, int] | None = None) -> dict[str, int]:
    """A number for each open dimension, by its name: what was asked for, sums of others where the name is a sum, and
    otherwise some even number of its own."""
    names = dict.fromkeys(
        name_of(v, at) for v in model.graph.inputs if v.shape is not None
        for at, n in enumerate(v.shape) if not isinstance(n, int)
    )  # fmt: skip
    found: dict[str, int] = {}
    sums = [n for n in names if re.fullmatch(r"\s*[\w.]+(\s*\+\s*[\w.]+)+\s*", n)]
    for at, name in enumerate(n for n in names if n not in sums):
        found[name] = (asked or {}).get(name, _FIRST + _STEP * at)
    for name in sums:
        parts = [x.strip() for x in name.split("+")]
        known = [int(x) if x.isdecimal() else found.get(x) for x in parts]
        total = sum(x for x in known if x is not None)
        found[name] = (asked or {}).get(name, total if None not in known else _FIRST + _STEP * len(found))
    return found


def name_of(v: ir.Value, at: int) -> str:
    """The name of an open dimension of an input; those without have one by their place."""
    assert v.shape is not None
    n: Any = v.shape[at]
    return str(n.value) if getattr(n, "value", None) is not None else f"{v.name}.{at}"


def shape_of(v: ir.Value, sizes: Mapping[str, int]) -> list[int]:
    """The shape of an input for sizes of the open dimensions."""
    assert v.shape is not None
    return [n if isinstance(n, int) else sizes[name_of(v, at)] for at, n in enumerate(v.shape)]


def dtype_of(v: ir.Value) -> torch.dtype:
    """The element type of an input. Raises TargetError where torch has none."""
    dtype = DTYPES.get(int(v.dtype)) if v.dtype is not None else None
    if dtype is None:
        raise TargetError(f"the input {v.name!r} has elements that are not known here")
    return dtype


def traced(model: ir.Model, sizes: Mapping[str, int]) -> Traced:
    """The trace of a graph. Raises TargetError where a node has no row."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    own = [v for v in model.graph.inputs if v.name not in model.graph.initializers]
    fakes: list[Any] = [_fake(mode, v, sizes) for v in own]
    known: dict[str, Any] = {}
    made: dict[str, Any] = {}
    placed: list[str] = []
    learned: set[int] = set()
    plain = scales(model)
    for name, x in constants(model).items():
        count = 1
        for n in x.shape:
            count *= int(n)
        spelling = None
        pairs = len(x.shape) >= 2 and min(int(n) for n in x.shape[-2:]) > 1
        places = count > 64 and count == max((int(n) for n in x.shape), default=0)  # fewer may be sizes
        if 1 < count <= _MOST_MASK and (pairs or places):
            spelling = spelled(_data(x, name))
        if spelling is not None:
            made[name] = spelling
            continue
        value = of_constant(_data(x, name), name in plain) if count <= 64 else None
        if value is not None and not isinstance(value, torch.Tensor):
            known[name] = value
            continue
        dtype = DTYPES.get(int(x.dtype))
        if dtype is None:
            raise TargetError(f"the data {name!r} has elements that are not known here")
        with mode:
            fake: Any = torch.empty([int(n) for n in x.shape], dtype=dtype)
            if dtype.is_floating_point and fake.ndim:
                fake = torch.nn.Parameter(fake, requires_grad=False)
                learned.add(len(fakes) + len(placed))
        placed.append(name)
        known[name] = fake
    held: list[tuple[str, ir.Value]] = []

    def seen(value: ir.Value, x: Any) -> None:
        node = torch_private.traced_node(x) if isinstance(x, torch.Tensor) else None
        if node is not None:
            held.append((node.name, value))

    inlined = Inlined(mode)

    def call(*given: Any) -> list[torch.Tensor]:
        inputs = {str(v.name): x for v, x in zip(own, given, strict=False)}
        data = known | dict(zip(placed, given[len(own) :], strict=True)) | {n: f() for n, f in made.items()}
        return run(model, inputs, data, seen, inlined.run)

    with torch.no_grad():
        try:
            gm = torch_private.trace(call, mode, [*fakes, *(known[n] for n in placed)])
        except TargetError as error:
            raise _unequal(str(error), own, fakes) or error from error
    names = {n.name: n for n in gm.graph.nodes}
    found = Traced(gm.graph, scans=inlined.scans)
    places = list(gm.graph.find_nodes(op="placeholder"))
    data_values = constant_values(model)
    for node, value in zip(places, [*own, *(data_values[n] for n in placed)], strict=True):
        if value is not None:
            found.values[node] = value
    for name, value in held:
        node = names.get(name)
        if node is not None:
            found.values.setdefault(node, value)
    found.parameters = frozenset(n for at, n in enumerate(places) if at in learned)
    return found


class UnequalSizes(TargetError):
    """A graph does not run unless the open dimensions of these `names` are equal."""

    def __init__(self, message: str, names: tuple[str, str]) -> None:
        super().__init__(message)
        self.names = names


def _unequal(message: str, own: Sequence[ir.Value], fakes: Sequence[torch.Tensor]) -> UnequalSizes | None:
    """What to make of a message of torch's that two sizes should be the same, where both are of inputs."""
    found = re.search(r"\((s\d+)\) must match .*\((s\d+)\)", message)
    if found is None:
        return None
    names = {str(n): name_of(v, at) for v, x in zip(own, fakes, strict=False) for at, n in enumerate(x.shape)
             if isinstance(n, torch.SymInt)}  # fmt: skip
    pair = [names.get(symbol) for symbol in found.groups()]
    return UnequalSizes(message, (pair[0], pair[1])) if pair[0] is not None and pair[1] is not None else None


def _data(x: Any, name: str) -> torch.Tensor:
    try:
        return of_data(x)
    except Unsupported as error:
        raise TargetError(f"the data {name!r}: {error}") from error


def _fake(mode: FakeTensorMode, v: ir.Value, sizes: Mapping[str, int]) -> torch.Tensor:
    assert v.shape is not None
    dims = [DimDynamic.STATIC if isinstance(n, int) else DimDynamic.DUCK for n in v.shape]
    context = StatelessSymbolicContext(dynamic_sizes=dims, constraint_sizes=[None] * len(dims))
    real = torch.empty(shape_of(v, sizes), dtype=dtype_of(v))
    return mode.from_tensor(real, symbolic_context=context, static_shapes=False)
