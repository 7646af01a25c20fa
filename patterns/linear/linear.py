"""Linear attention: q' (k'^T v), recognised and left as it is: its work is linear in the tokens already.

Two products, the inner one (a running sum in causal ones) over the tokens of two data tensors, its result (d x e)
summed over d with a third. The same two products also appear where nothing attends (bilinear pooling, whitening,
iterations on matrices), so one thing more is asked for: that the output is divided by the sum of the weights, or that
queries and keys went through a feature map, or that all three tensors are projections of tokens and more tokens are
summed than channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attncc.ir.analysis import exact
from attncc.ir.attention import Access, Axis
from attncc.ir.build import ONE, ZERO, op
from attncc.ir.evaluate import NAME_OF
from attncc.ir.expr import ROUNDINGS, Const, Expr, Index, Load, Op, free, loads, substitute, walk
from attncc.ir.linear import UNIT, Linear, X
from attncc.ir.reasons import Reason, because
from attncc.ir.verify import VerifyError
from attncc.ir.verify_linear import verify_linear
from attncc.patterns.linear.normalisers import Weighted, divided, multiplied
from attncc.patterns.site import (
    DOT,
    ELEMENTS,
    VIEW_OPS,
    Contraction,
    Data,
    Declared,
    Facts,
    Point,
    Reader,
    Unreadable,
    argument,
    contraction,
    factored,
    op_name,
    spelled_out,
    summed_pair,
)

_SEARCH = 24


@dataclass(frozen=True)
class Result:
    """A node that holds an output of a linear attention: `axes` names the IR's axis along each of its dimensions, ""
    for one of extent 1. Its rows may be more, with zeros behind them; `row` is the one that it holds, if it is one."""

    node: fx.Node
    output: str
    axes: tuple[str, ...]
    row: int | None = None


@dataclass(frozen=True)
class Recognised:
    """A linear attention. `node` holds its output, `axes` names the IR's axis along each of its
    dimensions ("" for one of extent 1); `tensors` are the graph's nodes for the IR's tensors, `sizes` the expressions,
    over the graph's symbols, of its sizes. `covered` are nodes that it explains: the softmaxes that are its feature
    maps, the quotient that normalises it. A kernel may take the place of `results`, if there are any: they are then
    all that is read of it elsewhere."""

    linear: Linear
    node: fx.Node
    anchor: fx.Node
    reason: Reason
    axes: tuple[str, ...]
    tensors: tuple[fx.Node, ...]
    sizes: tuple[Expr, ...]
    covered: frozenset[fx.Node] = frozenset()
    results: tuple[Result, ...] = ()


@dataclass(frozen=True)
class Factor:
    """One operand: `node[at]` is what the product reads; `load` is the element that `phi` is a map of."""

    node: fx.Node
    at: Point
    load: Load
    phi: Expr


def linear_attentions(f: Facts) -> Iterator[Recognised]:
    """Every q' (k'^T v) of the graph, in order."""
    data = Data(f)
    for n in f.graph.nodes:
        if n not in f.live or n not in data:
            continue
        outer, factor = _outer(f, n)
        if outer is None or outer.bias is not None:
            continue
        for left in (True, False):
            try:
                found = _lift(f, outer, factor, data, state_left=left)
            except (Unreadable, VerifyError):
                continue
            if found is not None:
                yield found
                break


def _outer(f: Facts, n: fx.Node) -> tuple[Contraction | None, tuple[fx.Node, tuple[int, ...]] | None]:
    """The product that `n` is, and a third factor of an einsum that only scales rows, with the dimensions of the result
    that it has."""
    plain = contraction(f, n)
    if plain is not None or n.target is not torch.ops.aten.einsum.default:
        return plain, None
    equation: Any = n.args[0]
    factors: Any = n.args[1]
    if len(factors) != 3:
        return None, None
    *terms, out = spelled_out(equation, *(f.rank(x) for x in factors))
    rows = [at for at, letters in enumerate(terms) if set(letters) <= set(out)]
    if len(rows) != 1:
        return None, None
    (row,) = rows
    (a, x), (b, y) = ((factors[at], terms[at]) for at in range(3) if at != row)
    return summed_pair(f, n, (a, b), (x, y, out)), (factors[row], tuple(out.index(c) for c in terms[row]))


@dataclass(frozen=True)
class _Inner:
    """`node` sums the products of two tensors over their tokens: all of them, or those up to `row`."""

    node: fx.Node
    sides: tuple[tuple[fx.Node, Point], tuple[fx.Node, Point]]
    extent: Expr
    row: Expr | None = None


def _inner(f: Facts, n: fx.Node, x: Load, j: Index) -> _Inner | None:
    """The sum over tokens `j` that a state is, read where `x` reads it."""
    product = contraction(f, n)
    if product is not None:
        plain = x.tensor == DOT + n.name and product.bias is None and product.alpha == 1.0
        left, right = product.maps(x.index, j)
        return _Inner(n, ((product.lhs, left), (product.rhs, right)), product.extent) if plain else None
    source: Any = n.args[0]
    dim: int = argument(n, "dim") % f.rank(n)
    factors = factored(f, n, source)
    if x.tensor != n.name or factors is None:
        return None
    a, b = ((y.node, y.at((*x.index[:dim], j, *x.index[dim + 1 :]))) for y in factors)
    return _Inner(n, (a, b), f.shape(n)[dim], x.index[dim])


def _lift(
    f: Facts, outer: Contraction, factor: tuple[fx.Node, tuple[int, ...]] | None, data: Data, *,
    state_left: bool,
) -> Recognised | None:  # fmt: skip
    state, other = (outer.lhs, outer.rhs) if state_left else (outer.rhs, outer.lhs)
    inner_node = _product_behind(f, state)
    if inner_node is None or other not in data:
        return None
    use, shape = f.order[outer.node], f.shape(outer.node)
    out: Point = tuple(ZERO if s is ONE else Index(f"o{at}") for at, s in enumerate(shape))
    d, j = Index("d"), Index("j")
    extents: dict[Expr, Expr] = {x: s for x, s in zip(out, shape, strict=True) if x is not ZERO}
    extents[d] = outer.extent
    sides = outer.maps(out, d)
    state_at, q_at = sides if state_left else (sides[1], sides[0])
    product, scale = _scaled(Reader(f, use, extents).value_at(state, state_at, use))
    inner = None if product is None else _inner(f, inner_node, product, j)
    if inner is None or any(n not in data for n, _ in inner.sides):
        return None
    extents[j] = inner.extent
    (k, k_at), (v, v_at) = inner.sides if d in free(*inner.sides[0][1]) else reversed(inner.sides)
    in_q, in_k, in_v = free(*q_at), free(*k_at), free(*v_at)
    own = [x for x in out if x is not ZERO]
    rows = [x for x in own if x in in_q - in_k - in_v]
    columns = [x for x in own if x in in_v - in_k - in_q]
    split = d in in_q & in_k and d not in in_v and j in in_k & in_v
    if not split or not rows or len(columns) != 1 or any(x in in_v & in_q - in_k for x in own):
        return None
    i, e = rows[-1], columns[0]
    past = inner.row is not None
    if past and (inner.row is not i or j in in_q):
        return None
    read = f.order[inner_node]
    q_factor = _factor(f, other, q_at, extents, use, {i, d})
    k_factor, v_factor = _factor(f, k, k_at, extents, read, {j, d}), _factor(f, v, v_at, extents, read, {j, e}, v=True)
    weighted = Weighted(outer.node, out, (other, q_at), (k, k_at), (v, v_at), d, j, e, extents, inner.row)
    quotient = divided(f, weighted) if factor is None else None
    over = None if quotient is None else quotient.over
    if factor is not None:
        over = multiplied(f, weighted, (factor[0], tuple(out[at] for at in factor[1])))
        if over is None:
            return None
    softmaxes = feature_softmaxes(f, other), feature_softmaxes(f, k)
    mapped = [bool(s) or _is_feature(x.phi) for s, x in zip(softmaxes, (q_factor, k_factor), strict=True)]
    projected = all(_is_projected(f, x) for x in (other, k, v))
    wide = _is_wider(inner.extent, outer.extent)
    names: dict[Expr, str] = {i: "i", j: "j", d: "d", e: "e"}
    reason = because("linear")
    if over is None and not all(mapped) and not (softmaxes[1] and wide) and not (projected and wide):
        if past or not projected or not _is_wider(outer.extent, inner.extent):
            return None
        names = {e: "i", d: "j", j: "d", i: "e"}
        reason = because("linear-written-out")
        q_factor = _factor(f, v, v_at, extents, read, {j, e})
        v_factor = _factor(f, other, q_at, extents, use, {i, d}, v=True)
    batch = [x for x in own if x not in names]
    names |= {x: f"b{at}" for at, x in enumerate(batch)}
    declared = Declared(f, extents, {x: Index(name) for x, name in names.items()})

    def axis(x: Expr) -> Axis:
        held = quotient.columns if x is e and quotient is not None else extents[x]
        return Axis(names[x], declared.extent(held))

    of = {name: x for x, name in names.items()}

    def access(name: str, x: Factor) -> Access:
        return declared.access(name, f.by_name[x.load.tensor], x.load.index)

    linear, sizes = declared.close(Linear(
        sizes=(), batch=tuple(axis(x) for x in batch), i=axis(of["i"]), j=axis(of["j"]), d=axis(of["d"]),
        e=axis(of["e"]), tensors=(), q=access("q", q_factor), k=access("k", k_factor), v=access("v", v_factor),
        phi_q=declared.expr(q_factor.phi), phi_k=declared.expr(k_factor.phi), rate=declared.expr(scale),
        sees="past" if past else "all", over=over, dtype=NAME_OF[f.dtype(outer.node)],
    ))  # fmt: skip
    node = outer.node if quotient is None else quotient.node
    covered = softmaxes[0] | softmaxes[1] | {node}
    where: dict[Expr, Expr] = dict(zip(out if quotient is None else quotient.read, out, strict=True))
    axes = tuple(names.get(where.get(x, ZERO), "") for x in (out if quotient is None else quotient.at))
    return Recognised(
        verify_linear(linear), node, outer.node, reason, axes, tuple(declared.held), sizes, covered
    )


def _is_wider(tokens: Expr, channels: Expr) -> bool:
    """Whether more tokens than channels are summed; a length that is known at the call only is one of tokens."""
    if isinstance(tokens, Const) and isinstance(channels, Const):
        return tokens.value > channels.value
    return isinstance(channels, Const)


def _scaled(x: Expr) -> tuple[Load | None, Expr]:
    """(product, c) of an expression that is a product times a number, or a bare one."""
    scale: Expr = UNIT
    while isinstance(x, Op):
        if x.name in ROUNDINGS:
            x = x.args[0]
        elif x.name in ("mul", "div") and not any(isinstance(y, Load | Index) for y in walk(x.args[1])):
            scale, x = op(x.name, scale, x.args[1]), x.args[0]
        else:
            return None, UNIT
    return (x, scale) if isinstance(x, Load) else (None, UNIT)


def _product_behind(f: Facts, n: fx.Node) -> fx.Node | None:
    """The product or running sum that `n` is, moved, cast or scaled by one number."""
    for _ in range(_SEARCH):
        if contraction(f, n) is not None or op_name(n) == "cumsum":
            return n
        if n.op != "call_function" or not (n.target in VIEW_OPS or n.target in ELEMENTS):
            return None
        inputs = [a for a in n.all_input_nodes if f.is_tensor(a) and f.rank(a) > 0]
        if len(inputs) != 1:
            return None
        n = inputs[0]
    return None


def _carried(f: Facts, n: fx.Node) -> Iterator[fx.Node]:
    """`n` and what it is made of by moves and element by element."""
    stack, seen = [n], set[fx.Node]()
    while stack and len(seen) < _SEARCH:
        x = stack.pop(0)
        if x in seen:
            continue
        seen.add(x)
        yield x
        if x.op == "call_function" and (x.target in VIEW_OPS or x.target in ELEMENTS or op_name(x) in _PARTS):
            stack += x.all_input_nodes


_PARTS = {"getitem", "split", "split_with_sizes", "chunk", "unbind"}


def feature_softmaxes(f: Facts, n: fx.Node) -> frozenset[fx.Node]:
    """The softmaxes that an operand is, moved or changed element by element: of a tensor, not of scores."""
    return frozenset(
        x for x in _carried(f, n)
        if op_name(x) in ("softmax", "_softmax")
        and not any(contraction(f, y) is not None for y in _carried(f, x.all_input_nodes[0]))
    )  # fmt: skip


def _is_projected(f: Facts, n: fx.Node) -> bool:
    """Whether an operand is a projection of tokens by a layer, possibly normalised or shaped after it."""
    for x in _carried(f, n):
        name = op_name(x)
        if name in ("linear", "addmm", "conv1d", "conv2d", "conv3d", "convolution", "layer_norm", "batch_norm"):
            return True
        if name in ("matmul", "mm") and any(a in f.parameters for a in x.all_input_nodes):
            return True
    return False


_MAPS = {"max", "maxfirst", "min", "minfirst", "exp", "sigmoid", "where", "abs", "pow", "tanh"}


def _is_feature(phi: Expr) -> bool:
    """Whether an element goes through more than a number's product: relu, elu + 1, exp, a square."""
    return any(
        isinstance(x, Op) and (x.name in _MAPS or (x.name == "mul" and X in free(x.args[0]) & free(x.args[1])))
        for x in walk(phi)
    )


def _factor(
    f: Facts, n: fx.Node, at: Point, extents: dict[Expr, Expr], when: int, needed: set[Expr], *, v: bool = False
) -> Factor:
    """An operand as a map of one tensor's element, or, where it is made of several, as the tensor it is."""
    value = Reader(f, when, extents).value_at(n, at, when)
    held = [x for x in loads(value) if not x.tensor.startswith(DOT)]
    if len(held) == 1 == len(loads(value)) and needed <= free(held[0]) and (not v or value is held[0]):
        load = held[0]
        phi = substitute(exact(value), {load: X})
        if not any(isinstance(x, Index) for x in walk(phi)):
            return Factor(n, at, load, phi)
    return Factor(n, at, Load(n.name, at, "float"), X)
