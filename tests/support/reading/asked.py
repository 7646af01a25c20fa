"""What the reader answers about a node, held against what the node holds.

Samples are calls of one operator on small tensors. They are traced into one graph; the reader is asked for the value of
each result at a point, and its expression is evaluated at every element that the point takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from attncc.ir.build import ONE, ZERO, add, const, floordiv, mod, sub
from attncc.ir.evaluate import Evaluator
from attncc.ir.expr import Const, Expr, Index, Load, loads
from attncc.patterns.graph.facts import Facts
from attncc.patterns.reader.assumptions import Reach
from attncc.patterns.reader.contractions import DOT, Contraction, contraction
from attncc.patterns.reader.value import Reader
from attncc.patterns.reader.view_ops import Point

Q = torch.Tensor
aten = torch.ops.aten
#: How far an answer may be from what an op holds in its dtype, relative and absolute.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def writes(target: OpOverload) -> bool:
    """Whether an operator writes to its first argument."""
    arguments = target._schema.arguments
    return bool(arguments) and arguments[0].alias_info is not None and arguments[0].alias_info.is_write


@dataclass(frozen=True)
class Sample:
    """One call of an operator, and which of its results is asked for where it gives several. An operator that writes to
    its first argument gets a copy of it. With `prepare`, the operator is called on what that makes of the arguments, in
    the same graph."""

    target: OpOverload
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    which: int | None = None
    prepare: Callable[..., tuple[Any, ...]] | None = None

    @property
    def writes(self) -> bool:
        return writes(self.target)

    @property
    def inputs(self) -> list[Q]:
        return [x for x in tree_flatten((self.args, self.kwargs))[0] if isinstance(x, Q)]

    def call(self, given: Sequence[Q]) -> Any:
        """The operator's result on other tensors in the places of its own."""
        leaves, spec = tree_flatten((self.args, self.kwargs))
        rest = iter(given)
        args, kwargs = tree_unflatten([next(rest) if isinstance(x, Q) else x for x in leaves], spec)
        if self.prepare is not None:
            args = self.prepare(*args)
        if self.writes:
            args = (args[0].clone(), *args[1:])
        result = self.target(*args, **kwargs)
        return result if self.which is None else result[self.which]

    def __repr__(self) -> str:
        def shown(x: Any) -> Any:
            return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" if isinstance(x, Q) else x

        leaves, spec = tree_flatten((self.args, self.kwargs))
        args, kwargs = tree_unflatten([shown(x) for x in leaves], spec)
        said = [*map(str, args), *(f"{k}={v}" for k, v in kwargs.items())]
        return f"{self.target}({', '.join(said)})" + ("" if self.which is None else f"[{self.which}]")


@dataclass(frozen=True)
class Answer:
    """An expression for a node at a point, its values there, and what the node holds there."""

    value: Expr
    got: Q
    want: Q
    loaded: bool  # the reader stopped at the node itself

    @property
    def right(self) -> bool:
        if self.want.dtype.is_floating_point:
            by = TOLERANCE[self.want.dtype]
            return torch.allclose(self.got.double(), self.want.double(), rtol=by, atol=by, equal_nan=True)
        kinds = [torch.bool if x.dtype == torch.bool else x.is_floating_point() for x in (self.got, self.want)]
        return kinds[0] == kinds[1] and bool((self.got == self.want).all())


class Asked:
    """A graph whose nodes are asked about. With `symbolic`, its sizes are symbols."""

    def __init__(self, call: Callable[..., Any], *inputs: Q, symbolic: bool = False) -> None:
        mode = "symbolic" if symbolic else "fake"
        self.module: fx.GraphModule = make_fx(call, tracing_mode=mode, pre_dispatch=True)(*inputs)
        self.inputs = [x.clone() for x in inputs]
        self.facts = Facts(self.module.graph)
        self._held: dict[str, Any] | None = None
        self.results: list[fx.Node] = list(next(n for n in self.facts.nodes if n.op == "output").all_input_nodes)

    def reader(self, extents: Mapping[Expr, Expr], *, assuming: bool = False) -> Reader:
        reach = Reach(dict(extents)) if assuming else None
        return Reader(self.facts, len(self.facts.nodes), dict(extents), reach=reach)

    def plain(self, n: fx.Node) -> tuple[Point, dict[Expr, Expr]]:
        """An index for each dimension."""
        shape = self.facts.shape(n)
        at = tuple(ZERO if s is ONE else Index(f"x{d}") for d, s in enumerate(shape))
        return at, {x: s for x, s in zip(at, shape, strict=True) if x is not ZERO}

    def answer(self, n: fx.Node, at: Point, extents: Mapping[Expr, Expr], *, assuming: bool = False) -> Answer:
        """What the reader says that `n` is at a point. Under assumptions it may load from outside of tensors."""
        value = self.reader(extents, assuming=assuming).value_at(n, at)
        held = self.held()
        sizes = self._sizes(held)
        lengths = {x: int(Evaluator(sizes, {}, torch.float64)(e)) for x, e in extents.items()}
        grid = sizes | lines(lengths)
        tensors = {name: x for name, x in held.items() if isinstance(x, Q)}
        for x in loads(value):
            if x.tensor.startswith(DOT):
                product = contraction(self.facts, self.facts.by_name[x.tensor.removeprefix(DOT)])
                assert product is not None
                tensors[x.tensor] = self.product(product)
        whole = tensors[n.name]
        compute = torch.float64 if whole.dtype == torch.float64 else torch.float32
        evaluator = (_Clamping if assuming else Evaluator)(grid, tensors, compute, rounding=True, checked=not assuming)
        got = evaluator(value)
        place = torch.broadcast_tensors(*(evaluator(x) for x in at)) if at else ()
        want = whole[place] if at else whole
        return Answer(value, got.expand(want.shape), want, any(x.tensor == n.name for x in loads(value)))

    def held(self) -> dict[str, Any]:
        """What each node holds when the graph has run, those beside the graph among them."""
        if self._held is None or len(self._held) + 1 < len(self.facts.order):
            self._held = self._run(lambda n, found: None)
        return self._held

    def held_when(self, nodes: set[str]) -> dict[str, dict[str, Any]]:
        """Copies of what every node holds, for each of some nodes when that has just been computed."""
        copies: dict[str, dict[str, Any]] = {}

        def copy(n: fx.Node, found: dict[str, Any]) -> None:
            if n.name in nodes:
                copies[n.name] = {name: x.clone() if isinstance(x, Q) else x for name, x in found.items()}

        self._run(copy)
        return copies

    def _run(self, after: Callable[[fx.Node, dict[str, Any]], None]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        inputs = iter([x.clone() for x in self.inputs])
        runner = fx.Interpreter(self.module)
        for n in self.facts.in_order([*self.facts.nodes, *self.facts.made]):
            args, kwargs = fx.map_arg((n.args, n.kwargs), lambda x: found[x.name])
            if n.op == "placeholder":
                found[n.name] = next(inputs)
            elif n.op == "get_attr":
                found[n.name] = runner.fetch_attr(str(n.target))
            elif n.op == "call_function":
                found[n.name] = n.target(*args, **kwargs)  # type: ignore[operator]
            after(n, found)
        return found

    def _sizes(self, held: Mapping[str, Any]) -> dict[Expr, Q]:
        known: dict[Any, int] = {}
        for n in self.facts.nodes:
            if n.op == "placeholder" and self.facts.is_tensor(n):
                pairs = zip(self.facts.value(n).shape, held[n.name].shape, strict=True)
                known |= {s.node.expr: k for s, k in pairs if isinstance(s, torch.SymInt)}
        return {size: torch.tensor(int(x.xreplace(known))) for size, x in self.facts.symbols.items()}

    def product(self, product: Contraction) -> Q:
        """What a product comes to without what is added and multiplied, by the maps of its factors."""
        held = self.held()
        sizes, shape = self._sizes(held), held[product.node.name].shape
        at = tuple(ZERO if s == 1 else Index(f"p{d}") for d, s in enumerate(shape))
        c, extent = Index("c"), int(Evaluator(sizes, {}, torch.float64)(product.extent))
        lengths = {Index(f"p{d}"): s for d, s in enumerate(shape)}
        tensors = {name: x for name, x in held.items() if isinstance(x, Q)}
        evaluator = Evaluator({**sizes, **lines({**lengths, c: extent})}, tensors, torch.float64, checked=True)
        sides = zip((product.lhs, product.rhs), product.maps(at, c), strict=True)
        left, right = (evaluator(Load(x.name, index, "float")) for x, index in sides)
        return (left * right).expand(*shape, extent).sum(-1)


class _Clamping(Evaluator):
    """Under assumptions loads may lie outside of their tensors where nothing selects them."""

    def _load(self, source: Q, index: tuple[Q, ...]) -> Q:
        return super()._load(source, tuple(x.clamp(0, n - 1) for x, n in zip(index, source.shape, strict=True)))


def lines(lengths: Mapping[Expr, int]) -> dict[Expr, Q]:
    """Each index as a range along a dimension of its own."""
    return {
        x: torch.arange(n).view([-1 if k == d else 1 for k in range(len(lengths))])
        for d, (x, n) in enumerate(lengths.items())
    }


def asked(samples: Sequence[Sample], *, symbolic: bool = False) -> Asked:
    """One graph of all samples, a result of it for each."""
    counts = [len(s.inputs) for s in samples]

    def run(*given: Q) -> list[Any]:
        rest = iter(given)
        return [s.call([next(rest) for _ in range(count)]) for s, count in zip(samples, counts, strict=True)]

    found = Asked(run, *(x for s in samples for x in s.inputs), symbolic=symbolic)
    for s, n in zip(samples, found.results, strict=True):
        _named(s, n if s.which is None else n.all_input_nodes[0])
    return found


def _named(sample: Sample, n: fx.Node) -> None:
    """Sees to it that a node is a call of the operator of its sample: a trace has other names for some."""
    if n.target is not sample.target:
        assert n.target is _TRACED_AS.get(sample.target), f"{sample} is traced as {n.target}"
        n.target = sample.target


_TRACED_AS = {aten.lift_fresh.default: aten.lift_fresh_copy.default, aten.copy_.Tensor: aten.copy_.default}


def random_point(shape: Sequence[Expr], random: Random) -> tuple[Point, dict[Expr, Expr]]:
    """A point inside of a shape of numbers, as views make them of the indices of an attention, and their extents."""
    at: list[Expr] = []
    extents: dict[Expr, Expr] = {}

    def fresh(n: int) -> Index:
        x = Index(f"u{len(extents)}")
        extents[x] = const(n)
        return x

    for s in shape:
        assert isinstance(s, Const)
        n = int(s.value)
        known = [x for x, length in extents.items() if isinstance(length, Const) and length.value <= n]
        forms: list[Callable[[], Expr]] = [
            lambda n=n: fresh(n),
            lambda n=n: const(random.randrange(n)),
            lambda n=n: sub(const(n - 1), fresh(n)),
            lambda n=n: floordiv(fresh(2 * n), const(2)),
            lambda n=n: mod(fresh(n + 2), const(n)),
            lambda n=n: add(fresh((n + 1) // 2), const(n // 2)),
            lambda n=n, known=known: random.choice(known) if known else fresh(n),
        ]
        at.append(random.choice(forms)() if n else ZERO)
    return tuple(at), extents


def mistakes(samples: Sequence[Sample], random: Random) -> tuple[list[str], int]:
    """What the reader answered wrong about samples, at every index, at random points, and under assumptions; and how
    many of the samples it read by the operator's rule."""
    of, wrong, read = asked(samples), list[str](), 0
    for sample, n in zip(samples, of.results, strict=True):
        plain, (point, extents) = of.plain(n), random_point(of.facts.shape(n), random)
        answers = [
            ("everywhere", plain[0], of.answer(n, *plain)),
            ("at a point", point, of.answer(n, point, extents)),
            ("under assumptions", point, of.answer(n, point, extents, assuming=True)),
        ]
        read += not answers[0][2].loaded
        for where, at, x in answers:
            if not x.right:
                given = [y.tolist() for y in sample.inputs]
                wrong.append(f"{sample} {where} {at}: {x.value} is {x.got.tolist()}, not {x.want.tolist()}; of {given}")
    return wrong, read
