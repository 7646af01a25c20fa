"""An attention over tokens in another order, between layouts that bring them into it and back.

    attention(q, k, v)  ->  undo( attention'( do(q), do(k), do(v) ) )

An order is a formula (`Known`), or is read from permutations that a step before the attention makes (`Read`). What the
score, the mask and the weight say of a token they then say of the place where the order has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from attncc.ir import (
    Attention,
    Axis,
    Const,
    Expr,
    Index,
    Layout,
    Load,
    Node,
    Program,
    Size,
    Step,
    Table,
    Tensor,
    kind_of,
)
from attncc.ir.attention import fresh_name
from attncc.ir.rewrite import substitute
from attncc.ir.terms import loads
from attncc.passes.rewrites.tile_layout import TokenOrder, tile_layout


@dataclass(frozen=True)
class Known:
    """An order in closed form: its position of a token is a formula."""

    order: TokenOrder


@dataclass(frozen=True)
class Read:
    """An order that `make(attention)` computes before it: a node that reads tensors of the attention and gives the
    token at each place, i64[lead.., tokens], for each point of `lead(attention)`, expressions over its batch."""

    make: Callable[[Attention], Node]
    lead: Callable[[Attention], tuple[Expr, ...]]


@dataclass(frozen=True)
class _Permuted:
    """What a permutation that is a tensor says of a token."""

    tensor: str
    lead: tuple[Expr, ...]
    tokens: int

    def position(self, t: Expr) -> Expr:
        return Load(self.tensor, (*self.lead, t), "int")


def in_order(p: Program, order: Known | Read) -> Program:
    """`p` with the tokens of each attention in an order. Raises ValueError where its rows and keys are not the tokens
    of the order, or are not indexed by a dimension of each operand."""
    steps: list[Step] = []
    taken, made = {*p.values()}, dict[object, str]()
    for step in p.steps:
        steps += _moved(step, order, taken, made) if isinstance(step.node, Attention) else [step]
    return replace(p, steps=tuple(steps))


def _moved(step: Step, order: Known | Read, taken: set[str], made: dict[object, str]) -> list[Step]:
    """`made` are the permutations that there are, so that layouts by the same one cancel."""
    a = step.node
    assert isinstance(a, Attention)
    also = {x.tensor for x in loads(a.score, a.mask, a.weight, *(x for x in (a.sink, a.drop) if x is not None))}
    if also & {x.tensor for x in (a.q, a.k, a.v)}:
        raise ValueError("an operand is read by the score or the mask, too, in the order of the tokens")
    steps: list[Step] = []
    arguments = list(step.arguments)
    read: tuple[Tensor, str] | None = None
    if isinstance(order, Known):
        source: TokenOrder = order.order
    else:
        node, lead = order.make(a), order.lead(a)
        by_name = dict(zip((t.name for t in a.tensors), step.arguments, strict=True))
        given_by = tuple(by_name[t.name] for t in node.tensors)
        what = node.values if isinstance(node, Table) else (node, given_by)
        if what not in made:
            made[what] = fresh_name("order", taken)
            taken.add(made[what])
            steps.append(Step((made[what],), node, given_by, _sizes(step, node.sizes)))
        result = made[what]
        (given,) = kind_of(node).gives(node)
        own = fresh_name("order", {x.name for x in (*a.axes, *a.sizes, *a.tensors)})
        if not isinstance(given.shape[-1], Const):
            raise ValueError("the number of tokens is known at the call alone")
        source, read = _Permuted(own, lead, int(given.shape[-1].value)), (replace(given, name=own), result)
    after = tile_layout(a, source)
    for at, t in enumerate(a.tensors):
        tokens = {x.index for x, access in ((a.i, a.q), (a.j, a.k), (a.j, a.v)) if access.tensor == t.name}
        if not tokens:
            continue
        (access, *_) = (x for x in (a.q, a.k, a.v) if x.tensor == t.name)
        place = next(n for n, x in enumerate(access.index) if x in tokens)
        name = fresh_name(f"{step.results[0]}_{t.name}", taken)
        taken.add(name)
        steps.append(_layout(step, t, place, source, access.index, arguments[at], name, read))
        arguments[at] = name
    if read is not None and any(n.tensor == read[0].name for n in loads(*after.expressions())):
        after, arguments = replace(after, tensors=(*after.tensors, read[0])), [*arguments, read[1]]
    moved = tuple(fresh_name(f"{name}_tiled", taken) for name in step.results)
    taken |= {*moved}
    steps.append(replace(step, node=after, arguments=tuple(arguments), results=moved))
    rows = (*(x.index for x in a.batch), a.i.index)
    for name, given, tiled in zip(step.results, kind_of(a).gives(a), moved, strict=True):
        places = {"out": [-2], "lse": [-1], "weights": [-2, -1]}[given.name]
        for n, place in enumerate(places):
            last = n == len(places) - 1
            at = (*rows, a.j.index) if given.name == "weights" else rows
            result = name if last else f"{name}_{n}"
            dim = len(given.shape) + place
            steps.append(_layout(step, given, dim, source, at, tiled, result, read, inverse=True))
            tiled = result
    return steps


def _layout(
    step: Step, t: Tensor, place: int, order: TokenOrder, index: tuple[Expr, ...], argument: str, result: str,
    read: tuple[Tensor, str] | None, *, inverse: bool = False,
) -> Step:  # fmt: skip
    """The step that brings a tensor, read at `index`, into the order along a dimension, or back."""
    sizes: dict[Size, None] = {}
    axes: list[Axis] = []
    for n, x in enumerate(t.shape):
        if not isinstance(x, Const | Size):
            raise ValueError(f"{t.name} has the extent {x!r}, which is neither a constant nor a size")
        axes.append(Axis(f"x{n}", x))
        sizes |= {x: None} if isinstance(x, Size) else {}
    source = order.position(Index(f"x{place}"))
    tensors, arguments = (replace(t, name="x"),), (argument,)
    if read is not None:
        source = _over_dimensions(source, index, place)
        tensors, arguments = (*tensors, read[0]), (argument, read[1])
    node = Layout(tuple(sizes), tuple(axes), tensors, f"x{place}", source, inverse)
    return Step((result,), node, arguments, _sizes(step, node.sizes))


def _over_dimensions(source: Expr, index: tuple[Expr, ...], place: int) -> Expr:
    """An expression over the batch of an attention as one over the dimensions before `place` of a tensor that is read
    at `index`."""
    table: dict[Expr, Expr] = {x: Index(f"x{n}") for n, x in enumerate(index[:place]) if not isinstance(x, Const)}
    found = substitute(source, table)
    known = {Index(f"x{n}") for n in range(place + 1)}
    left = [x for load in loads(found) for n in load.index for x in _indices(n) if x not in known]
    if left:
        raise ValueError(f"a dimension behind that of the tokens decides their order ({left[0]!r})")
    return found


def _indices(x: Expr) -> list[Index]:
    return [x] if isinstance(x, Index) else [y for c in x.children for y in _indices(c)]


def _sizes(step: Step, wanted: tuple[Size, ...]) -> tuple[Expr, ...]:
    table = dict(zip(step.node.sizes, step.sizes, strict=True))
    return tuple(table[s] for s in wanted)
