"""Chunked code as a function of its tokens: where it begins, and what it computes, run in float64.

It begins where tensors with an axis of all tokens are cut into chunks: at those tensors, taken back over paddings and
over products of one token's values with each other. What can be run from them and from constants alone is the region.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map

from attncc.patterns.site import VIEW_OPS, Facts, argument, is_operator, op_name, written_args

#: Operations that are analytic in their tensors: equal at random points, two compositions of them are equal. The second
#: group chooses by a mask, or reads at indices, and is analytic where those are constants.
_ANALYTIC = {
    "add", "sub", "rsub", "mul", "neg", "exp", "matmul", "bmm", "mm", "einsum", "cumsum", "sum", "pad",
    "constant_pad_nd", "clone", "contiguous", "to", "_to_copy", "tril", "triu", "cat", "stack", "copy_", "add_", "mul_",
    "sub_", "linalg_solve_triangular", "baddbmm", "zeros_like", "ones_like", "empty_like", "full_like", "new_zeros",
    "new_empty", "new_ones", "repeat", "repeat_interleave", "flip", "type_as", "float", "double", "lift_fresh_copy",
    "zero_", "fill_", "getitem", "split", "split_with_sizes", "chunk", "unbind",
}  # fmt: skip
_CHOOSING = {"masked_fill", "masked_fill_", "where", "index_select", "index", "gather"}
_DIVIDES = {"div"}
_UNCHANGED = {"to", "_to_copy", "contiguous", "clone", "float", "type_as"}
#: Elements of all that a region computes beyond which it is not run.
_MOST = 1 << 31


@dataclass(frozen=True)
class Leaf:
    """A tensor that a region begins with: `labels` are the axes of the cut along its dimensions, in the order of what
    is cut into chunks."""

    node: fx.Node
    labels: tuple[int, ...]


@dataclass(frozen=True)
class Cut:
    """Where a region begins: tensors with one axis of `tokens`, the label `axis`; `padded` are those of its chunks, as
    which the nodes `chunked` hold them."""

    held: tuple[Leaf, ...]
    chunked: tuple[fx.Node, ...]
    axis: int
    tokens: int
    padded: int

    @property
    def leaves(self) -> tuple[fx.Node, ...]:
        return tuple(x.node for x in self.held)


def shape_of(f: Facts, n: fx.Node) -> tuple[int, ...] | None:
    """The shape of a node if it is known."""
    value = f.value(n)
    sizes: tuple[Any, ...] = tuple(value.shape) if isinstance(value, torch.Tensor) else (None,)
    return sizes if all(isinstance(s, int) for s in sizes) else None


def cut_at(f: Facts, cumsum: fx.Node) -> Cut | None:
    """The cut of the region that sums logarithms of decays over the tokens of each chunk at `cumsum`."""
    chunked = cumsum.all_input_nodes[0]
    while chunked.op == "call_function" and _split(f, chunked) is None:
        if op_name(chunked) not in _UNCHANGED and chunked.target not in VIEW_OPS and op_name(chunked) not in _MOVES:
            return None
        chunked = chunked.all_input_nodes[0]
    split = _split(f, chunked) if chunked.op == "call_function" else None
    if split is None:
        return None
    axis, count, length = split
    cuts = _beside(f, chunked, count, length)
    found: dict[fx.Node, Leaf] = {}
    counts: set[int] = set()
    for n in cuts:
        source = n.all_input_nodes[0]
        for leaf, tokens in _back(f, source, tuple(range(f.rank(source))), axis):
            if found.setdefault(leaf.node, leaf) != leaf:
                return None
            counts.add(tokens)
    if len(counts) != 1:
        return None
    return Cut(tuple(found[n] for n in f.in_order(found)), tuple(cuts), axis, counts.pop(), count * length)


def _beside(f: Facts, chunked: fx.Node, count: int, length: int) -> list[fx.Node]:
    """What else is cut into the same chunks and meets `chunked` before the chunks are joined again."""
    later: dict[fx.Node, None] = {chunked: None}
    stack = [chunked]
    while stack:
        for user in stack.pop().users:
            if user in later or user not in f.live or user.op != "call_function":
                continue
            later[user] = None
            if _is_analytic(user) and not _joins(f, user, count, length):
                stack.append(user)
    found: dict[fx.Node, None] = {chunked: None}
    joined = _towards(f, [n for n in later if _joins(f, n, count, length) or written_args(n)], later)
    inside = (n for n in joined if n is not chunked and _is_analytic(n) and not _joins(f, n, count, length))
    stack, seen = list(inside), set[fx.Node]()
    while stack:
        for a in stack.pop().all_input_nodes:
            if a in seen or a in later:
                continue
            seen.add(a)
            split = _split(f, a) if a.op == "call_function" else None
            if split is not None and split[1:] == (count, length):
                found[a] = None
            else:
                stack.append(a)
    return f.in_order(found)


def _towards(f: Facts, ends: Sequence[fx.Node], among: Mapping[fx.Node, None]) -> set[fx.Node]:
    """What some nodes are computed from, as far as that is `among` others, with what is written on the way."""
    found, stack = {*ends}, list(ends)
    while stack:
        n = stack.pop()
        fresh = {a for a in (*n.all_input_nodes, *f.writes(n, f.order[n], len(f.order))) if a in among} - found
        found |= fresh
        stack += fresh
    return found


def _joins(f: Facts, n: fx.Node, count: int, length: int) -> bool:
    """Whether a node makes one axis of chunks and their tokens again."""
    if op_name(n) not in ("reshape", "view", "_unsafe_view", "flatten", "unflatten"):
        return False
    before, after = shape_of(f, n.all_input_nodes[0]), shape_of(f, n)
    if before is None or after is None or len(before) <= len(after):
        return False
    return any(before[at : at + 2] == (count, length) and count * length in after for at in range(len(before) - 1))


def _is_analytic(n: fx.Node) -> bool:
    name = op_name(n)
    return n.target in VIEW_OPS or name in _ANALYTIC or name in _CHOOSING or name in _DIVIDES


_MOVES = {"permute", "transpose", "pad", "unsqueeze", "squeeze", "expand"}


def _split(f: Facts, n: fx.Node) -> tuple[int, int, int] | None:
    """(axis, chunks, tokens a chunk) where a node cuts one axis of its input in two."""
    if op_name(n) not in ("reshape", "view", "_unsafe_view", "unflatten"):
        return None
    before, after = shape_of(f, n.all_input_nodes[0]), shape_of(f, n)
    if before is None or after is None or len(after) != len(before) + 1:
        return None
    for axis in range(len(before)):
        rest = before[:axis] == after[:axis] and before[axis + 1 :] == after[axis + 2 :]
        if rest and before[axis] == after[axis] * after[axis + 1] and axis > 0:
            return axis, after[axis], after[axis + 1]
    return None


def _back(f: Facts, n: fx.Node, labels: tuple[int, ...], cut_axis: int) -> Iterator[tuple[Leaf, int]]:
    """The tensors that one with all tokens is made of, over paddings and products, with their number of tokens.
    `labels` are the axes of the cut along the dimensions of `n`; tokens are at `cut_axis`."""
    shape = shape_of(f, n)
    if shape is None or cut_axis not in labels:
        return
    inner, own = _peeled(f, n, labels)
    axis = own.index(cut_axis) if cut_axis in own else 0
    padded = _padded(f, inner, axis)
    if padded is not None:
        yield from _back(f, padded, own, cut_axis)
        return
    factors = [a for a in inner.args if isinstance(a, fx.Node)] if op_name(inner) == "mul" else []
    tokens = shape[labels.index(cut_axis)]
    if len(factors) == 2 and all(_has_tokens(f, a, axis, tokens, len(own)) for a in factors):
        a, b = factors
        if not _comes_from(f, a, b) and not _comes_from(f, b, a):
            for x in factors:
                yield from _back(f, *_narrowed(f, x, own), cut_axis)
            return
    yield Leaf(inner, own), tokens


def _peeled(f: Facts, n: fx.Node, labels: tuple[int, ...]) -> tuple[fx.Node, tuple[int, ...]]:
    """What a node is a cast of, its axes in another order."""
    while n.op == "call_function":
        name, before = op_name(n), n.all_input_nodes[:1]
        if name in _UNCHANGED and f.is_tensor(before[0]):
            n = before[0]
        elif name in ("transpose", "permute"):
            order = list(range(len(labels)))
            if name == "transpose":
                x, y = (int(argument(n, d)) % len(labels) for d in ("dim0", "dim1"))
                order[x], order[y] = y, x
            else:
                order = [at % len(labels) for at in argument(n, "dims")]
            labels = tuple(labels[order.index(at)] for at in range(len(labels)))
            n = before[0]
        else:
            break
    return n, labels


def _narrowed(f: Facts, n: fx.Node, labels: tuple[int, ...]) -> tuple[fx.Node, tuple[int, ...]]:
    """A factor without the dimensions of extent 1 that it has for the product alone, casts over them included."""
    inner = n
    while op_name(inner) in _UNCHANGED:
        inner = inner.all_input_nodes[0]
    if op_name(inner) != "unsqueeze":
        return n, labels
    at: int = argument(inner, "dim") % len(labels)
    return _narrowed(f, inner.all_input_nodes[0], labels[:at] + labels[at + 1 :])


def _padded(f: Facts, n: fx.Node, axis: int) -> fx.Node | None:
    """What is padded with zeros behind the tokens, and nowhere else."""
    if op_name(n) not in ("pad", "constant_pad_nd"):
        return None
    before, after = (shape_of(f, x) for x in (n.all_input_nodes[0], n))
    constant = op_name(n) != "pad" or argument(n, "mode") == "constant"
    if before is None or after is None or not constant or argument(n, "value") not in (None, 0):
        return None
    ends: Any = argument(n, "pad")
    only = all(x == y for at, (x, y) in enumerate(zip(before, after, strict=True)) if at != axis)
    return n.all_input_nodes[0] if only and not any(ends[::2]) else None


def _has_tokens(f: Facts, n: fx.Node, axis: int, tokens: int, rank: int) -> bool:
    shape = shape_of(f, n)
    return shape is not None and len(shape) == rank and shape[axis] == tokens


def _comes_from(f: Facts, n: fx.Node, source: fx.Node) -> bool:
    """Whether a node is computed from another one, or from what that one is a move of."""
    moves = ("pad", "unsqueeze", "transpose", "permute")
    while source.op == "call_function" and (op_name(source) in moves or op_name(source) in _UNCHANGED):
        source = source.all_input_nodes[0]
    stack, seen = [n], {n}
    while stack:
        x = stack.pop()
        if x is source:
            return True
        fresh = [a for a in x.all_input_nodes if a not in seen and f.order[a] >= f.order[source]]
        seen.update(fresh)
        stack += fresh
    return False


@dataclass(frozen=True)
class Region:
    """The nodes that are computed from the leaves of a cut, in order; `exits` are those that are read outside."""

    nodes: tuple[fx.Node, ...]
    exits: tuple[fx.Node, ...]
    constants: frozenset[fx.Node]


def region_of(f: Facts, cut: Cut, states: Sequence[fx.Node] = ()) -> Region:
    """What can be run from the leaves, initial `states` and constants. A tensor that anything else is written to is
    none of it from then on."""
    own: dict[fx.Node, None] = dict.fromkeys((*cut.leaves, *states))
    constants: set[fx.Node] = set()
    filled, spoilt = set[int | None](), set[int | None]()  # memory that the region, and others, have written to
    given = len(own)
    ways = _ways(f, cut)
    for n in f.graph.nodes:
        if n in own or n.op in ("placeholder", "output"):
            continue
        inputs = n.all_input_nodes
        if n not in ways and any(x in own for x in inputs) and not written_args(n):
            if not any(x in ways or x in states for x in inputs):
                continue  # what others make of the same tokens
            ways.add(n)  # behind the chunks, or a state
        if n.op == "get_attr":
            constants.add(n)
            continue
        known = all((x in own or x in constants) and not (spoilt and f.storage(x) in spoilt) for x in inputs)
        mine = known and any(x in own or (filled and f.storage(x) in filled) for x in inputs)
        if known and not mine and is_operator(n) and not _random(n):
            constants.add(n)
        elif mine and _analytic(n, own):
            own[n] = None
            filled |= {f.storage(x) for x in written_args(n)} - {None}
        else:
            spoilt |= {f.storage(x) for x in written_args(n) if x in own or x in constants} - {None}
    nodes = tuple(own)[given:]
    inside = {*nodes}
    exits = tuple(n for n in nodes if n in f.live and any(u in f.live and u not in inside for u in n.users))
    return Region(nodes, exits, frozenset(constants))


def _ways(f: Facts, cut: Cut) -> set[fx.Node]:
    """What lies between the leaves and the chunks."""
    found, stack = {*cut.chunked}, list(cut.chunked)
    while stack:
        n = stack.pop()
        if n in cut.leaves:
            continue
        fresh = [a for a in n.all_input_nodes if a not in found and a not in cut.leaves]
        found.update(fresh)
        stack += fresh
    return found


def missing_state(f: Facts, cut: Cut, region: Region) -> fx.Node | None:
    """The first tensor that stands beside the region's where they meet: an initial state, if the region has one."""
    inside = {*region.nodes, *cut.leaves}
    for n in f.graph.nodes:
        if op_name(n) not in ("matmul", "mul", "cat", "sub") or not any(x in inside for x in n.all_input_nodes):
            continue
        for x in n.all_input_nodes:
            if x in inside or x in region.constants or not f.is_tensor(x):
                continue
            while op_name(x) in _UNCHANGED or x.target in VIEW_OPS:  # casts to what the region computes in
                x = x.all_input_nodes[0]
            if x not in inside and f.rank(x) == 4 and f.dtype(x).is_floating_point:
                return x
    return None


def _random(n: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in n.target.tags  # type: ignore[union-attr]


def _analytic(n: fx.Node, own: Mapping[fx.Node, None]) -> bool:
    name = op_name(n)
    if name in ("detach", "detach_"):  # values are the same, gradients are not
        return False
    if n.target in VIEW_OPS or name in _ANALYTIC:
        return True
    data = [a for a in n.args if isinstance(a, fx.Node) and a in own]
    if name in _DIVIDES:
        return n.args[1] not in data and not n.kwargs
    if name == "where":
        return n.args[0] not in data
    return name in _CHOOSING and data == [n.args[0]]


def run(
    f: Facts, region: Region, given: Mapping[fx.Node, torch.Tensor], keep: set[fx.Node]
) -> dict[fx.Node, Any] | None:
    """What the nodes of `keep` hold in float64, given the leaves; None where that is too much to run."""
    sizes = (shape_of(f, n) for n in region.nodes)
    if sum(torch.Size(s).numel() for s in sizes if s is not None) > _MOST:
        return None
    needed = {*region.nodes}
    stack = list(region.nodes)
    while stack:
        for a in stack.pop().all_input_nodes:
            if a not in needed and a not in given:
                needed.add(a)
                stack.append(a)
    last = {a: n for n in f.graph.nodes if n in needed for a in n.all_input_nodes}
    alias = {x for n in needed for x in written_args(n)}
    held: dict[fx.Node, Any] = dict(given)
    for n in f.graph.nodes:
        if n not in needed or n in held:
            continue
        if n.op == "get_attr":
            held[n] = _wide(getattr(f.graph.owning_module, str(n.target)))
            continue
        target: Any = n.target
        args, kwargs = fx.map_arg((n.args, dict(n.kwargs)), held.__getitem__)  # type: ignore[misc]
        args, kwargs = tree_map(_in_float64, (args, kwargs))
        made = target(*args, **kwargs)
        held[n] = _wide(made)
        for a in n.all_input_nodes:
            if last.get(a) is n and a not in keep and a not in alias:
                held.pop(a, None)
    return {n: x for n, x in held.items() if n in keep}


def _wide(x: Any) -> Any:
    """Tensors of floats in float64; those that are already are the same, as others may write to them."""
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def _in_float64(x: Any) -> Any:
    if isinstance(x, torch.dtype):
        return torch.float64 if x.is_floating_point else x
    return x
