"""Ops that only move values: `out[index] = input[index']`. One small rule an op: it gives the input and its index."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from attncc.ir.affine import Extents, divide, less_than, long_division, nonnegative, poly, simplify
from attncc.ir.build import ONE, ZERO, add, const, mod, mul, sub
from attncc.ir.expr import Expr, Op
from attncc.patterns.reader.rules import Facts, Point, argument, dim_argument, hint, op_name

Move = tuple[fx.Node, Point]
Rule = Callable[[Facts, fx.Node, Point, Extents], Move | None]
aten = torch.ops.aten


def _dim(f: Facts, n: fx.Node, dim: int) -> int:
    return dim % max(f.rank(n), 1)


def _same(f: Facts, n: fx.Node, at: Point, ext: Extents) -> Move | None:
    return n.args[0], at  # type: ignore[return-value]


def _lifted(f: Facts, n: fx.Node, at: Point, ext: Extents) -> Move | None:
    """A constant as the trace holds it, which the model's own graph does not: a number can be read there."""
    source: Any = n.args[0]
    held = source.args[0] if source.target in _FRESH else source
    return (source, at) if held.op != "get_attr" or f.value(held).numel() == 1 else None


_FRESH = (aten.lift_fresh.default, aten.lift_fresh_copy.default)


def _permute(order: Callable[[Facts, fx.Node], Sequence[int]]) -> Rule:
    def rule(f: Facts, n: fx.Node, at: Point, ext: Extents) -> Move | None:
        source = n.args[0]
        assert isinstance(source, fx.Node)
        dims = [d % max(f.rank(n), 1) for d in order(f, n)]
        out: list[Expr] = [ZERO] * len(at)
        for position, d in enumerate(dims):
            out[d] = at[position]
        return source, tuple(out)

    return rule


def _transpose_order(f: Facts, n: fx.Node) -> Sequence[int]:
    order = list(range(f.rank(n)))
    if not order:
        return order
    dims: Any = n.args[1:3]
    a, b = (d % len(order) for d in dims)
    order[a], order[b] = order[b], order[a]
    return order


def _last_two(f: Facts, n: fx.Node) -> Sequence[int]:
    order = list(range(f.rank(n)))
    return [*order[:-2], *reversed(order[-2:])]


def _dims(x: Any) -> list[int]:
    return [x] if isinstance(x, int) else list(x)


def _movedim_order(f: Facts, n: fx.Node) -> Sequence[int]:
    rank = f.rank(n)
    if not rank:
        return []
    source, target = _dims(n.args[1]), _dims(n.args[2])
    order: list[int] = [-1] * rank
    for s, t in zip(source, target, strict=True):
        order[t % rank] = s % rank
    rest = iter(d for d in range(rank) if d not in order)
    return [next(rest) if d < 0 else d for d in order]


def _expand(f: Facts, n: fx.Node, at: Point, ext: Extents) -> Move | None:
    source: Any = n.args[0]
    return source, broadcast(f, source, at)


def unexpanded(f: Facts, n: fx.Node) -> fx.Node:
    """What a tensor of as many dimensions is repeated from."""
    while op_name(n) in ("expand", "expand_as") and f.rank(n.all_input_nodes[0]) == f.rank(n):
        n = n.all_input_nodes[0]
    return n


def broadcast(f: Facts, source: fx.Node, at: Point) -> Point:
    """The index into `source` of a point of something it broadcasts to."""
    return fitted(f.shape(source), at)


def fitted(shape: Sequence[Expr], at: Point) -> Point:
    """The last indices of a point for a shape that broadcasts to it: zero where the extent is 1."""
    tail = at[len(at) - len(shape) :]
    return tuple(ZERO if s is ONE else x for x, s in zip(tail, shape, strict=True))


def _unsqueeze(f: Facts, n: fx.Node, at: Point, ext: Extents) -> Move | None:
    d = _dim(f, n, argument(n, "dim"))
    return n.args[0], (*at[:d], *at[d + 1 :])  # type: ignore[return-value]


def _squeeze(f: Facts, n: fx.Node, at: Point, ext: Extents) -> Move | None:
    source: Any = n.args[0]
    shape = f.shape(source)
    dims: set[int] = set(range(len(shape)))
    if len(n.args) > 1:
        named: Any = n.args[1]
        dims = {d % len(shape) for d in ([named] if isinstance(named, int) else named)} if shape else set()
    gone = {d for d in dims if shape[d] is ONE}
    rest = iter(at)
    return source, tuple(ZERO if d in gone else next(rest) for d in range(len(shape)))


def _view(f: Facts, n: fx.Node, at: Point, ext: Extents) -> Move | None:
    source: Any = n.args[0]
    return source, reshape_index(at, f.shape(n), f.shape(source), ext)


def reshape_index(at: Point, shape: Sequence[Expr], source: Sequence[Expr], ext: Extents) -> Point:
    """The index into `source` of the element at `at` of its row-major reshape to `shape`.

    Dimensions are matched from the right in groups of equal product, so that an untouched dimension keeps its index."""
    out: list[Expr] = [ZERO] * len(source)
    o, s = len(shape), len(source)
    while s > 0:
        o0, s0 = o, s
        s -= 1
        have, want = source[s], ONE
        if o > 0:
            o -= 1
            want = shape[o]
        while poly(have) != poly(want):
            if o > 0 and (s == 0 or not _covers(have, want)):
                o -= 1
                want = mul(shape[o], want)
            elif s > 0:
                s -= 1
                have = mul(source[s], have)
            else:
                break
        linear: Expr = ZERO
        for d in range(o, o0):
            linear = add(mul(linear, shape[d]), at[d])
        linear = simplify(linear, ext)
        for d in range(s0 - 1, s, -1):
            linear, out[d] = divide(linear, source[d], ext)
        out[s] = linear
    return tuple(out)


def _covers(have: Expr, want: Expr) -> bool:
    """Whether the source group is the smaller one and has to grow."""
    p, q = poly(have), poly(want)
    if set(p) <= {()} and set(q) <= {()}:
        return p.get((), 0) < q.get((), 0)
    return not long_division(q, p)[1]


def _slice(f: Facts, n: fx.Node, at: Point, ext: Extents) -> Move | None:
    d = _dim(f, n, argument(n, "dim"))
    start = argument(n, "start")
    step: Any = argument(n, "step")
    source: Any = n.args[0]
    offset = slice_start(f, source, d, start)
    if offset is None:
        return None
    moved = add(mul(at[d], f.size(step)), offset)
    return source, (*at[:d], simplify(moved, ext), *at[d + 1 :])


def slice_start(f: Facts, source: fx.Node, d: int, start: object) -> Expr | None:
    """The first index of a slice, negatives counted from the end. The signs of symbolic numbers are those of the
    example: whoever traced the slice guards them. None where the example has none."""
    if start is None:
        return ZERO
    begin: Any = f.value(start) if isinstance(start, fx.Node) else start
    first, length = f.size(begin), f.value(source).shape[d]
    known, whole = hint(begin), hint(length)
    if known is None or (known < 0 and whole is None):
        return first if nonnegative(first, {}) else None
    if known >= 0:
        return first
    return add(f.size(length), first) if whole is None or whole + known >= 0 else ZERO


def _narrow(f: Facts, n: fx.Node, at: Point, ext: Extents) -> Move | None:
    d = _dim(f, n, argument(n, "dim"))
    source: Any = n.args[0]
    offset = slice_start(f, source, d, argument(n, "start"))
    return None if offset is None else (source, (*at[:d], simplify(add(at[d], offset), ext), *at[d + 1 :]))


def _select(f: Facts, n: fx.Node, at: Point, ext: Extents) -> Move | None:
    source: Any = n.args[0]
    d = argument(n, "dim") % f.rank(source)
    offset = slice_start(f, source, d, argument(n, "index"))
    return None if offset is None else (source, (*at[:d], offset, *at[d:]))


def _getitem(f: Facts, n: fx.Node, at: Point, ext: Extents) -> Move | None:
    """One of the parts that split, chunk or unbind gave."""
    parts: Any = n.args[0]
    which: Any = n.args[1]
    if isinstance(parts, fx.Node) and parts.target in _GRIDS and isinstance(which, int):
        return _of_grid(f, parts, which % len(f.value(parts)), at)
    if not isinstance(parts, fx.Node) or parts.target not in _PARTS or not isinstance(which, int):
        return None
    source: Any = parts.args[0]
    d = dim_argument(parts, f.rank(source))
    if parts.target is aten.unbind.int:
        count = f.value(source).shape[d]
        return source, (*at[:d], const(which % int(count)), *at[d:])
    before = f.value(parts)[: which if which >= 0 else len(f.value(parts)) + which]
    offset: Expr = ZERO
    for part in before:
        offset = add(offset, f.size(part.shape[d]))
    return source, (*at[:d], simplify(add(at[d], offset), ext), *at[d + 1 :])


def _of_grid(f: Facts, grid: fx.Node, which: int, at: Point) -> Move | None:
    """Coordinate `which` of a meshgrid: its first two axes change places for "xy"."""
    sources: Any = grid.args[0]
    swapped = argument(grid, "indexing") == "xy" if grid.target is aten.meshgrid.indexing else False
    dim = 1 - which if swapped and which < 2 and len(sources) > 1 else which
    return sources[which], (at[dim],) if f.rank(sources[which]) else ()


_GRIDS = {aten.meshgrid.default, aten.meshgrid.indexing}
_PARTS = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int, aten.split.sizes}


def _as_strided(f: Facts, n: fx.Node, at: Point, ext: Extents) -> Move | None:
    """A view by strides, windows that overlap among them, of a tensor without gaps: the place in memory is taken apart
    by the strides of that tensor."""
    source: Any = n.args[0]
    whole, part, shape = f.value(source), f.value(n), f.shape(source)
    order = [hint(stride) for stride in whole.stride()]
    if whole.storage_offset() != part.storage_offset() or None in order:
        return None
    place, last = ZERO, ZERO
    for x, length, stride in zip(at, f.shape(n), map(f.size, part.stride()), strict=True):
        place, last = add(place, mul(x, stride)), add(last, mul(sub(length, ONE), stride))
    out: list[Expr] = [ZERO] * len(shape)
    dims = sorted((d for d in range(len(shape)) if shape[d] is not ONE), key=lambda d: order[d] or 0)
    unit: Expr = ONE
    for d in dims:
        if poly(f.size(whole.stride(d))) != poly(unit):
            return None
        unit = mul(unit, shape[d])
        place, out[d] = (ZERO, simplify(place, ext)) if d == dims[-1] else divide(simplify(place, ext), shape[d], ext)
    return (source, tuple(out)) if less_than(last, unit, {}) else None


def _roll(f: Facts, n: fx.Node, at: Point, ext: Extents) -> Move | None:
    source: Any = n.args[0]
    shifts: Any = argument(n, "shifts")
    dims: Any = argument(n, "dims")
    if not dims:
        return None
    out = list(at)
    shape = f.shape(source)
    for shift, dim in zip(shifts, dims, strict=True):
        d: int = dim % len(shape)
        x = out[d]
        if isinstance(x, Op) and x.name == "mod" and poly(x.args[1]) == poly(shape[d]):
            x = x.args[0]  # turned round before
        out[d] = simplify(mod(sub(x, f.size(shift)), shape[d]), ext)
    return source, tuple(out)


def _flip(f: Facts, n: fx.Node, at: Point, ext: Extents) -> Move | None:
    source: Any = n.args[0]
    shape = f.shape(source)
    dims: Any = argument(n, "dims")
    flipped = {d % len(shape) for d in dims}
    return source, tuple(
        simplify(sub(sub(s, ONE), x), ext) if d in flipped else x
        for d, (x, s) in enumerate(zip(at, shape, strict=True))
    )


def _repeat(f: Facts, n: fx.Node, at: Point, ext: Extents) -> Move | None:
    source: Any = n.args[0]
    shape = f.shape(source)
    tail = at[len(at) - len(shape) :]
    return source, tuple(
        x if less_than(x, s, ext) else simplify(mod(x, s), ext) for x, s in zip(tail, shape, strict=True)
    )


def _repeat_interleave(f: Facts, n: fx.Node, at: Point, ext: Extents) -> Move | None:
    source: Any = n.args[0]
    repeats = argument(n, "repeats")
    if argument(n, "dim") is None or not isinstance(repeats, int):
        return None
    d = dim_argument(n, f.rank(source))
    return source, (*at[:d], divide(at[d], const(repeats), ext)[0], *at[d + 1 :])


#: The table: add a line for a new op. Every rule returns None where it cannot tell, and the op's result is then loaded.
VIEW_OPS: dict[object, Rule] = {
    **dict.fromkeys(
        [aten.contiguous.default, aten.clone.default, aten.detach.default, aten.alias.default],
        _same),
    **dict.fromkeys([*_FRESH, aten.detach_.default], _lifted),
    **dict.fromkeys([aten.transpose.int, aten.swapaxes.default, aten.swapdims.default], _permute(_transpose_order)),
    aten.permute.default: _permute(lambda f, n: n.args[1]),  # type: ignore[arg-type,return-value]
    **dict.fromkeys([aten.t.default, aten.mT.default, aten.adjoint.default], _permute(_last_two)),
    aten.numpy_T.default: _permute(lambda f, n: list(reversed(range(f.rank(n))))),
    **dict.fromkeys([aten.movedim.int, aten.movedim.intlist, aten.moveaxis.int], _permute(_movedim_order)),
    **dict.fromkeys([aten.expand.default, aten.expand_as.default, aten.broadcast_to.default], _expand),
    aten.unsqueeze.default: _unsqueeze,
    **dict.fromkeys([aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims], _squeeze),
    **dict.fromkeys(
        [aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
         aten.unflatten.int, aten.view_as.default, aten.reshape_as.default], _view),
    aten.slice.Tensor: _slice,
    aten.narrow.default: _narrow,
    aten.select.int: _select,
    aten.as_strided.default: _as_strided,
    aten.roll.default: _roll,
    aten.flip.default: _flip,
    **dict.fromkeys([aten.repeat.default, aten.tile.default], _repeat),
    aten.repeat_interleave.self_int: _repeat_interleave,
}  # fmt: skip


def move(f: Facts, n: fx.Node, at: Point, ext: Extents, *, crossing: bool = False) -> Move | None:
    """Where the element `at` of `n` comes from, if `n` only moves values.

    Not across the end of a gradient, unless `crossing`: whoever reads the source then stops the gradient himself."""
    if n.op != "call_function":
        return None
    rule = _getitem if getattr(n.target, "__name__", "") == "getitem" else VIEW_OPS.get(n.target)
    found = None if rule is None else rule(f, n, at, ext)
    if found is None or not f.is_tensor(found[0]) or (not crossing and stops(f, n, found[0])):
        return None
    return found


def stops(f: Facts, n: fx.Node, source: fx.Node) -> bool:
    """Whether gradients that would flow from `n` into `source` are stopped between the two."""
    g, at = f.gradients, f.order[n]
    return g is not None and g.follows(source, at) and not g.follows(n, at + 1)
