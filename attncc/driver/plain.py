"""Graphs that can hold no attention, told by the names of their operations: they are not read.

Attention contracts two computed tensors. A graph in which only parameters are contracted with (linear layers,
convolutions), and nothing else sums or is unknown, has none: a perceptron, a residual network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

#: What works on each element by itself, on windows of an image, or on no element at all.
_PLAIN = {
    "add", "alpha_dropout", "adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool2d", "batch_norm",
    "ceil", "chunk", "clamp", "clone", "contiguous", "detach", "dim", "dropout", "elu", "expand", "flatten", "float",
    "floordiv", "gelu", "getattr", "getitem", "getsize", "glu", "hardsigmoid", "hardswish", "hardtanh", "iadd", "imul",
    "interpolate", "item", "layer_norm", "leaky_relu", "max_pool2d", "mish", "mul", "neg", "numel", "pad", "permute",
    "relu", "relu6", "reshape", "selu", "sigmoid", "silu", "size", "softplus", "split", "squeeze", "sub", "tanh", "to",
    "transpose", "truediv", "type", "unflatten", "unsqueeze", "view",
}  # fmt: skip
#: Nodes between a sigmoid and its layer.
_STEPS = 6
#: What contracts with its second argument.
_WEIGHED = {"linear", "conv1d", "conv2d", "conv3d", "embedding"}


def plain(gm: fx.GraphModule) -> bool:
    """Whether a Dynamo graph holds no attention for certain, and no gate or modulation, which are reported."""
    nodes = [n for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    return all(map(_is_plain, nodes)) and not _may_gate(nodes)


def _may_gate(nodes: Sequence[fx.Node]) -> bool:
    """Whether elements are multiplied, and there is a sigmoid of a layer or a convolution of single channels."""
    multiplied = any(_name(n) in ("mul", "imul") and _both_computed(n) for n in nodes)
    return multiplied and any(_is_gate(n) or _is_grouped(n) for n in nodes)


def _both_computed(n: fx.Node) -> bool:
    return len(n.args) == 2 and all(isinstance(x, fx.Node) for x in n.args)


def _is_gate(n: fx.Node) -> bool:
    if _name(n) not in ("sigmoid", "hardsigmoid"):
        return False
    x: Any = n.args[0]
    for _ in range(_STEPS):
        if _name(x) in _WEIGHED or not isinstance(x, fx.Node) or not x.all_input_nodes:
            break
        x = x.all_input_nodes[0]
    return _name(x) in _WEIGHED


def _is_grouped(n: fx.Node) -> bool:
    groups = n.args[6] if len(n.args) > 6 else n.kwargs.get("groups", 1)
    return _name(n) in _WEIGHED and isinstance(groups, int) and groups > 1


def _name(n: Any) -> str:
    target = n.target if isinstance(n, fx.Node) and n.op.startswith("call") else ""
    return (target if isinstance(target, str) else getattr(target, "__name__", "")).rstrip("_")


def _is_plain(n: fx.Node) -> bool:
    name = _name(n)
    if name not in _WEIGHED:
        return n.op in ("call_function", "call_method") and name in _PLAIN
    weight = n.args[1] if len(n.args) > 1 else n.kwargs.get("weight")
    return isinstance(weight, fx.Node) and isinstance(weight.meta.get("example_value"), torch.nn.Parameter)
