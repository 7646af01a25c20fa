"""Gates and modulations: elements scaled by what layers make of others. No keys are summed, so that there is nothing to
fuse that Inductor does not fuse; they are reported, so that none is passed over in silence.

    x * sigmoid(layer(act(layer(g) + layer(x))))            additive gate (Oktay et al., 2018: arXiv 1804.03999)
    x * sigmoid(layers(mean over places of x))              squeeze and excite (Hu et al., 2018: arXiv 1709.01507)
    x * sigmoid(convolutions of x, or of x and g)           gate of places (Woo et al., 2018: arXiv 1807.06521)
    sum_l sigmoid(..)[l] * x[l]                             gated levels
    x * layers(depthwise convolutions of x)                 modulation (Yang et al., 2022: arXiv 2203.11926)
    convolution of x by filters that layers make            dynamic filters (Jia et al., 2016: arXiv 1605.09673)
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

from torch import fx

from attncc.ir.build import ONE
from attncc.ir.reasons import Reason, because
from attncc.patterns.reader import ELEMENTS, SUMS_AND_MEANS, VIEW_OPS, Facts, argument, contraction, op_name

#: Nodes behind a gate that are looked at.
_STEPS = 60
_SHARES = ("sigmoid", "hardsigmoid")
_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose2d", "conv_transpose3d")
_LAYERS = (*_CONVOLUTIONS, "linear", "matmul", "mm", "addmm", "einsum")
_NORMS = ("batch_norm", "group_norm", "layer_norm", "instance_norm")
_ACTS = ("relu", "tanh", "gelu", "silu", "leaky_relu", "elu", "prelu", "hardswish")
_POOLS = ("adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d", "amax", "max")
_PARTS = ("cat", "stack", "getitem", "split", "split_with_sizes", "chunk", "unbind")
_RESIZES = ("upsample_bilinear2d", "upsample_nearest2d", "upsample_trilinear3d", "upsample_nearest3d",
            "upsample_bicubic2d", "interpolate", "pad", "constant_pad_nd")  # fmt: skip


def gates(f: Facts, data: Container[fx.Node]) -> Iterator[tuple[Reason, fx.Node, fx.Node]]:
    """(reason, where it shows, what is scaled), in order, each gate once however many it scales."""
    said: set[fx.Node] = set()
    for n in f.graph.nodes:
        if n not in f.live or n not in data or n.op != "call_function":
            continue
        found = _of_product(f, n, data) or _filters(f, n, data)
        if found is not None and found[1] not in said:
            said.add(found[1])
            yield (*found, n)


def _of_product(f: Facts, n: fx.Node, data: Container[fx.Node]) -> tuple[Reason, fx.Node] | None:
    summed = contraction(f, n) is not None or _name(n) == "einsum"
    if not summed and _name(n) != "mul":
        return None
    sides = [x for x in n.all_input_nodes if f.is_tensor(x) and x in data]
    if len(sides) != 2:
        return None
    for side, other in (sides, sides[::-1]):
        shares = _behind_elements(f, side)
        if _name(shares) in _SHARES and shares in data:
            reason = _of_shares(f, shares, side, other, summed=summed)
            if reason is not None:
                return reason, shares
    if summed:
        return None
    for side, other in (sides, sides[::-1]):
        layer = _through(f, side, (*_NORMS, *_ACTS))
        if _name(layer) in _CONVOLUTIONS and _modulates(f, layer, other):
            return because("modulation"), layer
    return None


def _of_shares(f: Facts, shares: fx.Node, side: fx.Node, other: fx.Node, *, summed: bool) -> Reason | None:
    """What a product with a sigmoid is; None where it is a plain unit of a network, as GLU and SiLU are."""
    if _behind_elements(f, shares.all_input_nodes[0]) is other:
        return None  # x sigmoid(c x): SiLU, or GELU's approximation
    trail = _trail(f, shares.all_input_nodes[0])
    if not any(_is_layer(f, x) for x in trail):
        return None
    if summed:
        return because("gated-levels") if any(_name(x) in _CONVOLUTIONS for x in trail) else None
    if any(_joins(f, x) for x in trail):
        return because("additive-gate")
    if any(_pools(f, x) for x in trail) and _spread(f, shares, other):
        return because("squeeze-excite")
    reads = other in trail or not set(_trail(f, other)).isdisjoint(x for x in trail if _name(x) in _CONVOLUTIONS)
    convolved = any(_name(x) in _CONVOLUTIONS for x in trail)
    placeless = f.rank(side) == f.rank(other) >= 4 and all(x is ONE for x in f.shape(side)[2:])
    own = other in trail or placeless
    return because("gate") if own or (convolved and (reads or _spread(f, shares, other))) else None


def _is_layer(f: Facts, n: fx.Node) -> bool:
    plain = _name(n) in _CONVOLUTIONS or _name(n) == "linear"
    return plain or (_name(n) in _LAYERS and not f.parameters.isdisjoint(n.all_input_nodes))


def _joins(f: Facts, n: fx.Node) -> bool:
    """Whether a function of a sum of two layers."""
    if _name(n) not in _ACTS:
        return False
    total = n.all_input_nodes[0]
    if _name(total) != "add" or len(total.all_input_nodes) != 2:
        return False
    return all(_name(_through(f, a, (*_NORMS, *_RESIZES))) in _LAYERS for a in total.all_input_nodes)


def _pools(f: Facts, n: fx.Node) -> bool:
    if n.target in SUMS_AND_MEANS:
        return contraction(f, n) is None and not _normalises(f, n)
    return _name(n) in _POOLS


def _normalises(f: Facts, n: fx.Node) -> bool:
    """Whether a sum or mean of functions of a tensor's elements goes back to them, as in RMSNorm written out."""
    own, held = {n}, [a for a in n.all_input_nodes if f.is_tensor(a)]
    while len(held) == 1:
        own.add(held[0])
        moves = held[0].target in ELEMENTS or held[0].target in VIEW_OPS
        held = [a for a in held[0].all_input_nodes if f.is_tensor(a)] if moves else []
    stack, seen = [n], {n}
    while stack:
        for user in stack.pop().users:
            others = [a for a in user.all_input_nodes if f.is_tensor(a) and a not in seen]
            if any(a in own for a in others):
                return True
            if user not in seen and not others and (user.target in ELEMENTS or user.target in VIEW_OPS):
                seen.add(user)
                stack.append(user)
    return False


def _spread(f: Facts, shares: fx.Node, other: fx.Node) -> bool:
    """Whether there are fewer shares than elements that they scale."""
    few = [x for x in f.shape(shares) if x is not ONE]
    many = [x for x in f.shape(other) if x is not ONE]
    return len(few) < len(many)


def _modulates(f: Facts, layer: fx.Node, other: fx.Node) -> bool:
    """Whether convolutions of single channels, of what `other` is made of too, lie behind a layer."""
    trail = _trail(f, layer)
    own = {x for x in _trail(f, other) if x.op == "placeholder" or _name(x) in _LAYERS} | {other}
    return any(_depthwise(f, x) for x in trail) and not own.isdisjoint(trail)


def _depthwise(f: Facts, n: fx.Node) -> bool:
    groups: Any = argument(n, "groups") if _name(n) in _CONVOLUTIONS else 1
    return isinstance(groups, int) and groups > 1 and f.size(groups) is f.shape(n.all_input_nodes[0])[1]


def _filters(f: Facts, n: fx.Node, data: Container[fx.Node]) -> tuple[Reason, fx.Node] | None:
    """A convolution whose filters are computed from data."""
    if _name(n) not in _CONVOLUTIONS or len(n.args) < 2:
        return None
    filters = n.args[1]
    return (because("dynamic-filters"), n) if isinstance(filters, fx.Node) and filters in data else None


def _trail(f: Facts, n: fx.Node) -> list[fx.Node]:
    """What a node is computed from by layers, norms, moves and functions of elements, itself first."""
    found, seen, stack = list[fx.Node](), {n}, [n]
    inner = (*_LAYERS, *_NORMS, *_ACTS, *_POOLS, *_RESIZES, *_SHARES, *_PARTS)
    while stack and len(found) < _STEPS:
        x = stack.pop(0)
        found.append(x)
        plain = x.target in VIEW_OPS or x.target in ELEMENTS or x.target in SUMS_AND_MEANS or _name(x) in inner
        plain = plain and (_name(x) not in _LAYERS or _is_layer(f, x))  # not through products of attention
        if x.op == "call_function" and plain:
            fresh = [a for a in x.all_input_nodes if a not in seen and a not in f.parameters and not f.is_number(a)]
            seen.update(fresh)
            stack += fresh
    return found


def _behind_elements(f: Facts, n: fx.Node) -> fx.Node:
    """What a tensor is by moves, and by functions of its elements with numbers, up to a sigmoid."""
    while n.op == "call_function" and _name(n) not in _SHARES:
        held = [a for a in n.all_input_nodes if f.is_tensor(a)]
        moves = n.target in VIEW_OPS or n.target in ELEMENTS or _name(n) in _RESIZES
        if len(held) != 1 or not moves:
            break
        n = held[0]
    return n


def _through(f: Facts, n: fx.Node, names: tuple[str, ...]) -> fx.Node:
    while n.op == "call_function" and n.all_input_nodes and (n.target in VIEW_OPS or _name(n) in names):
        n = n.all_input_nodes[0]
    return n


def _name(n: fx.Node) -> str:
    return op_name(n).rstrip("_")
