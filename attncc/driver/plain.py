"""Graphs that can hold no attention, told by the names of their operations: they are not read.

Attention contracts two computed tensors. A graph in which only parameters are contracted with (linear layers,
convolutions), and nothing else sums or is unknown, has none: a perceptron, a residual network.
"""

from __future__ import annotations

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
_ACTS = {"relu", "leaky_relu", "elu", "gelu", "silu", "tanh"}
#: What contracts with its second argument.
_WEIGHED = {"linear", "conv1d", "conv2d", "conv3d", "embedding"}


def plain(gm: fx.GraphModule) -> bool:
    """Whether a Dynamo graph holds no attention for certain, nor an additive gate, which is reported."""
    nodes = [n for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    return all(map(_is_plain, nodes)) and not any(map(_gates, nodes))


def _gates(n: fx.Node) -> bool:
    """Whether a node is sigmoid(layer(act(layer(..) + layer(..))))."""
    if _name(n) != "sigmoid":
        return False
    layer = _unnormed(n.args[0])
    act = layer.args[0] if _name(layer) in _WEIGHED else None
    total = act.args[0] if isinstance(act, fx.Node) and _name(act) in _ACTS else None
    if not isinstance(total, fx.Node) or _name(total) not in ("add", "iadd"):
        return False
    return all(_name(_unnormed(x)) in _WEIGHED for x in total.args)


def _unnormed(n: Any) -> Any:
    while _name(n) in ("batch_norm", "layer_norm", "group_norm"):
        n = n.args[0]
    return n


def _name(n: Any) -> str:
    target = n.target if isinstance(n, fx.Node) and n.op.startswith("call") else ""
    return (target if isinstance(target, str) else getattr(target, "__name__", "")).rstrip("_")


def _is_plain(n: fx.Node) -> bool:
    name = _name(n)
    if name not in _WEIGHED:
        return n.op in ("call_function", "call_method") and name in _PLAIN
    weight = n.args[1] if len(n.args) > 1 else n.kwargs.get("weight")
    return isinstance(weight, fx.Node) and isinstance(weight.meta.get("example_value"), torch.nn.Parameter)
