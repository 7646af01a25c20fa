"""Graphs that can hold no attention, told by the names of their operations: they are not read.

Attention contracts two computed tensors. A graph in which only parameters are contracted with (linear layers,
convolutions), and nothing else sums or is unknown, has none: a perceptron, a residual network.
"""

from __future__ import annotations

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
#: What contracts with its second argument.
_WEIGHED = {"linear", "conv1d", "conv2d", "conv3d", "embedding"}


def plain(gm: fx.GraphModule) -> bool:
    """Whether a Dynamo graph holds no attention for certain."""
    return all(_is_plain(n) for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr", "output"))


def _is_plain(n: fx.Node) -> bool:
    name = (n.target if isinstance(n.target, str) else getattr(n.target, "__name__", "")).rstrip("_")
    if name not in _WEIGHED:
        return n.op in ("call_function", "call_method") and name in _PLAIN
    weight = n.args[1] if len(n.args) > 1 else n.kwargs.get("weight")
    return isinstance(weight, fx.Node) and isinstance(weight.meta.get("example_value"), torch.nn.Parameter)
