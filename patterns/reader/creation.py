"""Ops that create values, pick them by other values, or join tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from attncc.ir.affine import less_than, nonnegative, simplify
from attncc.ir.attention import DTYPES
from attncc.ir.build import ONE, ZERO, add, and_, cast, const, ge, lt, maximum, minimum, mul, sub, where
from attncc.ir.expr import Expr, Kind, loads
from attncc.patterns.reader import distances
from attncc.patterns.reader.pointwise import input_at
from attncc.patterns.reader.rules import Point, Rule, Values, argument, dim_argument, has_argument
from attncc.patterns.reader.view_ops import broadcast

aten = torch.ops.aten


def _arange(r: Values, n: fx.Node, at: Point) -> Expr | None:
    start = input_at(r, n, argument(n, "start"), at) if has_argument(n, "start") else ZERO
    step = input_at(r, n, argument(n, "step"), at) if has_argument(n, "step") else ONE
    if start is None or step is None or "float" in (start.kind, step.kind):
        return None
    return add(mul(at[0], step), start)


def _kind(r: Values, n: fx.Node) -> Kind:
    name = r.facts.dtype_name(n)
    assert name is not None  # or nothing of the node is read
    return DTYPES[name][0]


def _value(number: float) -> Rule:
    return lambda r, n, at: const(number)


def _filled(r: Values, n: fx.Node, at: Point) -> Expr | None:
    return input_at(r, n, argument(n, "fill_value"), at)


def _scalar(r: Values, n: fx.Node, at: Point) -> Expr | None:
    return input_at(r, n, n.args[0], at)


def clamped(r: Values, n: fx.Node, at: Point, dim: int, when: int) -> Expr:
    """`n` at a point whose coordinate `dim` may lie outside (the caller selects around it): loads are kept inside."""
    length = r.facts.shape(n)[dim]
    x = at[dim]
    inside = simplify(x, r.extents)
    if not nonnegative(inside, r.extents):
        inside = maximum(inside, ZERO)
    if not less_than(inside, length, r.extents):
        inside = minimum(inside, sub(length, ONE))
    free = r.value_at(n, at, when)
    if inside is x or not loads(free):
        return free
    return r.value_at(n, (*at[:dim], inside, *at[dim + 1 :]), when)


def _cat(r: Values, n: fx.Node, at: Point) -> Expr | None:
    dim = dim_argument(n, len(at))
    given: Any = n.args[0]
    # what has no element is no part, and torch lets a tensor of shape (0,) stand beside any other
    parts = [p for p in given if r.facts.rank(p) == len(at) and r.facts.shape(p)[dim] is not ZERO]
    when = r.facts.order[n]
    offset: Expr = ZERO
    pieces: list[tuple[Expr, Expr, fx.Node]] = []
    for part in parts:
        end = add(offset, r.facts.shape(part)[dim])
        pieces.append((offset, end, part))
        offset = end
    result: Expr | None = None
    for start, end, part in reversed(pieces):
        local = simplify(sub(at[dim], start), r.extents)
        if _outside(r, at[dim], start, end):
            continue
        value = clamped(r, part, (*at[:dim], local, *at[dim + 1 :]), dim, when)
        if result is None or less_than(at[dim], end, r.extents):
            result = value
        else:
            kind = _kind(r, n)
            result = where(lt(at[dim], end), cast(value, kind), cast(result, kind))
    return result


def _outside(r: Values, x: Expr, start: Expr, end: Expr) -> bool:
    return less_than(x, start, r.extents) or nonnegative(sub(x, end), r.extents)


def _stack(r: Values, n: fx.Node, at: Point) -> Expr | None:
    parts: list[Any] = list(n.args[0])  # type: ignore[arg-type]
    dim = dim_argument(n, len(at))
    rest = (*at[:dim], *at[dim + 1 :])
    result: Expr | None = None
    for which, part in reversed(list(enumerate(parts))):
        value = cast(r.value_at(part, rest, r.facts.order[n]), _kind(r, n))
        result = value if result is None else where(lt(at[dim], const(which + 1)), value, result)
    return result


def _pad(r: Values, n: fx.Node, at: Point) -> Expr | None:
    source: Any = n.args[0]
    pads: Any = argument(n, "pad")
    if has_argument(n, "mode") and argument(n, "mode") != "constant":
        return None
    fill = argument(n, "value")
    shape = r.facts.shape(source)
    inside: Expr = const(True)
    point = list(at)
    for pair in range(len(pads) // 2):
        dim = len(shape) - 1 - pair
        before = r.facts.size(pads[2 * pair])
        point[dim] = x = simplify(sub(at[dim], before), r.extents)
        if not nonnegative(x, r.extents):
            inside = and_(inside, ge(x, ZERO))
        if not less_than(x, shape[dim], r.extents):
            inside = and_(inside, lt(x, shape[dim]))
    when = r.facts.order[n]
    fill = 0 if fill is None else fill
    if r.reach is not None:
        number = cast(const(fill), _kind(r, n))
        return r.selected(inside, lambda: r.value_at(source, tuple(point), when), lambda: number)
    value = r.value_at(source, tuple(point), when)
    if loads(value):
        for dim, length in enumerate(shape):
            x = point[dim]
            x = x if nonnegative(x, r.extents) else maximum(x, ZERO)
            point[dim] = x if less_than(x, length, r.extents) else minimum(x, sub(length, ONE))
        value = r.value_at(source, tuple(point), when)
    return where(inside, value, cast(const(fill), value.kind))


def _wrapped(r: Values, x: Expr, length: Expr) -> Expr | None:
    """An index given as data: negative ones count from the end, as torch's indexing does."""
    if x.kind != "int":
        return None
    x = simplify(x, r.extents)
    return x if nonnegative(x, r.extents) else where(lt(x, ZERO), add(x, length), x)


def _index(r: Values, n: fx.Node, at: Point) -> Expr | None:
    """Advanced indexing by integer tensors that stand side by side (or from the front)."""
    source: Any = n.args[0]
    indices: Any = list(n.args[1])  # type: ignore[arg-type]
    shape = r.facts.shape(source)
    indices += [None] * (len(shape) - len(indices))
    used = [d for d, x in enumerate(indices) if x is not None]
    if not used or any(r.facts.dtype_name(indices[d]) not in ("i64", "i32") for d in used):
        return None
    together = used == list(range(used[0], used[-1] + 1))
    rank = max(r.facts.rank(indices[d]) for d in used)
    first = used[0] if together else 0
    picked = at[first : first + rank]
    rest = iter((*at[:first], *at[first + rank :]))
    point: list[Expr] = []
    for d, x in enumerate(indices):
        if x is None:
            point.append(next(rest))
            continue
        value = r.value_at(x, broadcast(r.facts, x, picked), r.facts.order[n])
        chosen = _wrapped(r, value, shape[d])
        if chosen is None:
            return None
        point.append(chosen)
    return r.value_at(source, tuple(point), r.facts.order[n])


def _masked_put(r: Values, n: fx.Node, at: Point) -> Expr | None:
    """`x[mask] = number`: a boolean tensor over some of the dimensions, and one value."""
    source: Any = n.args[0]
    indices: Any = list(n.args[1])  # type: ignore[arg-type]
    value: Any = n.args[2]
    masks = [(d, x) for d, x in enumerate(indices) if x is not None]
    if len(masks) != 1 or argument(n, "accumulate") or r.facts.value(value).numel() != 1:
        return None
    first, mask = masks[0]
    if r.facts.dtype_name(mask) != "bool":
        return None
    when = r.facts.order[n]
    chosen = r.value_at(mask, at[first : first + r.facts.rank(mask)], when)
    old = r.value_at(source, at, when)
    new = r.value_at(value, (ZERO,) * r.facts.rank(value), when)
    return where(chosen, cast(new, old.kind), old)


def _gather(r: Values, n: fx.Node, at: Point) -> Expr | None:
    source: Any = n.args[0]
    index: Any = argument(n, "index")
    dim = dim_argument(n, len(at))
    value = r.value_at(index, at, r.facts.order[n])
    return r.value_at(source, (*at[:dim], value, *at[dim + 1 :]), r.facts.order[n])


def _taken_along(r: Values, n: fx.Node, at: Point) -> Expr | None:
    """A gather in which the tensor and the indices broadcast to each other."""
    source: Any = n.args[0]
    indices: Any = n.args[1]
    if argument(n, "dim") is None:  # of the tensor laid out flat
        return None
    dim = dim_argument(n, len(at))
    value = r.value_at(indices, broadcast(r.facts, indices, at), r.facts.order[n])
    return r.value_at(source, broadcast(r.facts, source, (*at[:dim], value, *at[dim + 1 :])), r.facts.order[n])


def _index_select(r: Values, n: fx.Node, at: Point) -> Expr | None:
    source: Any = n.args[0]
    index: Any = argument(n, "index")
    dim = dim_argument(n, len(at))
    value = r.value_at(index, (at[dim],) if r.facts.rank(index) else (), r.facts.order[n])
    return r.value_at(source, (*at[:dim], value, *at[dim + 1 :]), r.facts.order[n])


def _embedding(r: Values, n: fx.Node, at: Point) -> Expr | None:
    table: Any = n.args[0]
    ids: Any = n.args[1]
    return r.value_at(table, (r.value_at(ids, at[:-1], r.facts.order[n]), at[-1]), r.facts.order[n])


def _outer(r: Values, n: fx.Node, at: Point) -> Expr | None:
    """An einsum of two factors that sums over nothing."""
    equation: Any = n.args[0]
    factors: Any = n.args[1]
    left, arrow, out = equation.replace(" ", "").partition("->")
    letters = left.split(",")
    whole = len(letters) == 2 and all(len(set(x)) == len(x) and set(x) <= set(out) for x in letters)
    if not arrow or "." in equation or not whole:
        return None
    where = dict(zip(out, at, strict=True))
    values = [
        cast(r.value_at(x, broadcast(r.facts, x, tuple(where[c] for c in term)), r.facts.order[n]), "float")
        for x, term in zip(factors, letters, strict=True)
    ]
    return mul(*values)


_ZEROS = [aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default]
_ONES = [aten.ones.default, aten.ones_like.default, aten.new_ones.default]
_FULLS = [aten.full.default, aten.full_like.default, aten.new_full.default]

SOURCES: dict[object, Rule] = {
    **dict.fromkeys([aten.arange.default, aten.arange.start, aten.arange.start_step], _arange),
    **dict.fromkeys(_ZEROS, _value(0)),
    **dict.fromkeys(_ONES, _value(1)),
    **dict.fromkeys(_FULLS, _filled),
    aten.scalar_tensor.default: _scalar,
    aten.einsum.default: _outer,
    aten.cat.default: _cat,
    aten.concat.default: _cat,
    aten.concatenate.default: _cat,
    aten.stack.default: _stack,
    aten.pad.default: _pad,
    aten.constant_pad_nd.default: _pad,
    aten.index.Tensor: _index,
    aten.index_put.default: _masked_put,
    aten.index_put_.default: _masked_put,
    aten.gather.default: _gather,
    aten.take_along_dim.default: _taken_along,
    aten.index_select.default: _index_select,
    aten.embedding.default: _embedding,
    aten.sum.dim_IntList: distances.of_sum,
    aten.mean.dim: distances.of_sum,
    aten.cdist.default: distances.of_points,
}
