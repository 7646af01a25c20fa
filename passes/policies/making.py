"""What rules make before an attention: values over its batch, by the nodes that reduce, score and select.

A value is made over those axes of the batch alone that it depends on, and once for all heads of a group where they
read the same keys. What no later step and no mask reads is dropped with the attention's other tensors of that kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from attncc.ir import Axis, Boxes, Const, Correct, Expr, Load, Reduce, S, Scores, Select, Size, Tensor
from attncc.ir.affine import expr, poly
from attncc.ir.analysis import blocks_of
from attncc.ir.build import FALSE, ONE, TRUE, ZERO, add, const, floordiv, mod, mul
from attncc.ir.expr import free, loads, mentions
from attncc.ir.reduce import Reduction
from attncc.ir.rewrite import substitute
from attncc.ir.scores import Norm
from attncc.ir.select import Take

if TYPE_CHECKING:
    from attncc.passes.policies.hiding import Hiding


@dataclass(frozen=True)
class Value:
    """A tensor that a step before the attention makes: `lead` are the indices of its first dimensions, in the names of
    the attention's batch; those of the others are the caller's."""

    name: str
    lead: tuple[Expr, ...]
    kind: str

    def __call__(self, *index: Expr) -> Load:
        return Load(self.name, (*self.lead, *index), self.kind)  # type: ignore[arg-type]


def reduced(
    site: Hiding, name: str, axes: Sequence[Axis], over: Axis, op: Reduction, value: Expr, seen: Expr = TRUE,
    none: Expr | None = None,
) -> Value:  # fmt: skip
    """`value` over an axis, for each point of `axes` and of the batch axes that it depends on."""
    lead, indices, (value, seen) = _own_batch(site.attention.batch, value, seen)
    nothing = (ZERO if value.kind == "int" else const(0.0)) if none is None else none
    tensors = _read(site, value, seen, nothing)
    node = Reduce(site.sizes, (*lead, *axes), over, tensors, op, value, seen, nothing)
    return Value(site.step_of(node, name), indices, "int" if value.kind == "int" else "float")


def over_heads(
    site: Hiding, name: str, made: Value, groups: Mapping[Axis, int], axes: Sequence[Axis], op: Reduction
) -> Value:
    """A value of each head as one of each group of heads: `groups` are how many that follow each other on an axis of
    the batch are one."""
    lead: list[Axis] = []
    indices: list[Expr] = []
    one = site.axis("r", Const(prod(groups.values())))
    table: dict[Expr, Expr] = {}
    inner = prod(groups.values())
    for x in site.attention.batch:
        group = groups.get(x, 1)
        if group == 1:
            lead.append(x)
            indices.append(x.index)
            continue
        assert isinstance(x.extent, Const)
        inner //= group
        lead.append(Axis(x.name, Const(int(x.extent.value) // group)))
        indices.append(floordiv(x.index, Const(group)))
        within = mod(floordiv(one.index, Const(inner)), Const(group))
        table[x.index] = add(mul(x.index, Const(group)), within)
    value = substitute(made(*(x.index for x in axes)), table)
    node = Reduce(site.sizes, (*lead, *axes), one, _read(site, value), op, value, none=const(0.0))
    return Value(site.step_of(node, name), tuple(indices), "float")


def scored(
    site: Hiding, name: str, i: Axis, j: Axis, d: Axis, x: Expr, y: Expr, score: Expr = S, seen: Expr = TRUE,
    norm: Norm = "softmax",
) -> Value:  # fmt: skip
    """What each point of i gives each of j, for each point of the batch."""
    batch = site.attention.batch
    node = Scores(site.sizes, batch, i, j, d, _read(site, x, y, score, seen), x, y, score, seen, norm)
    return Value(site.step_of(node, name), tuple(n.index for n in batch), "float")


def boxed(site: Hiding, name: str, i: Axis, p: Axis, size: int, shift: Expr, seen: Expr) -> Value:
    """(.., i, p): the bounds of products with the keys of each page p: those j of which (j + shift) // size is p, and
    which are `seen`."""
    a = site.attention
    q = substitute(site.load(a.q.tensor, a.q.index), {a.i.index: i.index})
    tensors = _read(site, q, site.load(a.k.tensor, a.k.index), shift, seen)
    node = Boxes(site.sizes, a.batch, i, p, a.j, a.d, tensors, q, a.k, size, shift, seen)
    return Value(site.step_of(node, name), tuple(n.index for n in a.batch), "float")


def selected(
    site: Hiding, name: str, over: Sequence[Axis], value: Expr, take: Take, amount: Expr = ONE, *, seen: Expr = TRUE,
    first: Expr = FALSE, rows: Sequence[Axis] = (),
) -> Value:  # fmt: skip
    """Which points of `over` are taken, for each of `rows` and of the batch axes that they depend on."""
    lead, indices, (value, amount, seen, first) = _own_batch(site.attention.batch, value, amount, seen, first)
    tensors = _read(site, value, amount, seen, first)
    node = Select(site.sizes, (*lead, *rows), tuple(over), tensors, value, take, amount, seen, first)
    return Value(site.step_of(node, name), indices, "bool")


def rounded(site: Hiding, made: Value, dtype: str) -> Value:
    """A float value in another dtype, itself where it has that."""
    t = site.attention.tensor(made.name)
    if t.dtype == dtype:
        return made
    axes = tuple(site.axis(f"x{n}", extent) for n, extent in enumerate(t.shape))
    used = {s for x in (*(n.extent for n in axes), *t.shape) for s in free(x) if isinstance(s, Size)}
    sizes = tuple(s for s in site.sizes if s in used)
    node = Correct(sizes, axes, (t,), Load(t.name, tuple(x.index for x in axes), "float"), dtype)
    return replace(made, name=site.step_of(node, t.name))


def _own_batch(batch: Sequence[Axis], *values: Expr) -> tuple[tuple[Axis, ...], tuple[Expr, ...], list[Expr]]:
    """The batch axes that values depend on, the indices by which the attention names them, and the values over them.
    An axis that occurs only as `// c` is one of its quotients."""
    axes: list[Axis] = []
    indices: list[Expr] = []
    found = list(values)
    for x in batch:
        touched = [n for n, value in enumerate(found) if mentions(value, x.index)]
        if not touched:
            continue
        inside = [blocks_of(found[n], x.index) for n in touched]
        groups = {n[1] if n is not None else 1 for n in inside}
        group = groups.pop() if len(groups) == 1 else 1
        if group > 1 and isinstance(x.extent, Const) and int(x.extent.value) % group == 0:
            for n, (value, _) in zip(touched, (y for y in inside if y is not None), strict=True):
                found[n] = value
            axes.append(Axis(x.name, Const(int(x.extent.value) // group)))
            indices.append(floordiv(x.index, Const(group)))
        else:
            axes.append(x)
            indices.append(x.index)
    return tuple(axes), tuple(indices), found


def _read(site: Hiding, *values: Expr) -> tuple[Tensor, ...]:
    """What values load from; a tensor of the attention where they load nothing, for the device."""
    names = {x.tensor for x in loads(*values)}
    tensors = site.attention.tensors
    return tuple(t for t in tensors if t.name in names) or tensors[:1]


def known(x: Expr) -> Expr:
    """A sum of products in canonical form: a number where it is one."""
    return expr(poly(x))

