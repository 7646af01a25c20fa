"""Rows of the op table that sum: products, reductions, normalisations, convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from attncc.frontends.onnx.attention import attention
from attncc.frontends.onnx.values import DTYPES, Unsupported, axis_of, integers, number, tensor

Row = Callable[..., Any]


def _gemm(
    a: Any, b: Any, c: Any = None, *, alpha: float = 1.0, beta: float = 1.0, transA: int = 0, transB: int = 0
) -> Any:
    a = a.t() if transA else a
    if alpha == 1.0 and beta == 1.0 and transB and (c is None or tensor(c).ndim == 1):
        return F.linear(a, b, c)
    found = (a @ (b.t() if transB else b)) * (1 if alpha == 1.0 else alpha)
    return found if c is None else found + tensor(c) * (1 if beta == 1.0 else beta)


def _reduction(op: Callable[[torch.Tensor, list[int], bool], Any]) -> Row:
    def row(x: Any, axes: Any = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Any:
        x = tensor(x)
        wanted = [] if axes is None else integers(axes)
        if not wanted:
            if noop_with_empty_axes:
                return x
            wanted = list(range(x.ndim))
        return op(x, wanted, bool(keepdims))

    return row


def _prod(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    for axis in sorted((axis_of(a, x.ndim) for a in axes), reverse=True):
        x = torch.prod(x, axis, keep)
    return x


def _sum(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    return torch.sum(x, axes, keep, dtype=x.dtype)


def _softmax(x: Any, *, axis: int | None = None, opset: int = 13, log: bool = False) -> Any:
    op = torch.log_softmax if log else torch.softmax
    if opset >= 13:
        return op(x, axis_of(-1 if axis is None else axis, x.ndim))
    axis = axis_of(1 if axis is None else axis, x.ndim)
    if axis == x.ndim - 1:
        return op(x, -1)
    return op(x.flatten(axis), -1).reshape(x.shape)  # all axes from this one on are one


def _layer_norm(
    x: Any, scale: Any, bias: Any = None, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1,
    outputs: int = 1,
) -> Any:  # fmt: skip
    out = F.layer_norm(x, x.shape[axis_of(axis, x.ndim) :], tensor(scale), None if bias is None else bias, epsilon)
    if outputs == 1:
        return out
    wide, axes = x.to(DTYPES[stash_type]), list(range(axis_of(axis, x.ndim), x.ndim))
    mean = wide.mean(axes, keepdim=True)
    return (out, mean, torch.rsqrt((wide - mean).pow(2).mean(axes, keepdim=True) + epsilon))[:outputs]


def _rms_norm(x: Any, scale: Any, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> Any:
    wide = x.to(DTYPES[stash_type])
    axes = list(range(axis_of(axis, x.ndim), x.ndim))
    return (wide * torch.rsqrt(wide.pow(2).mean(axes, keepdim=True) + epsilon)).to(x.dtype) * scale


def _group_norm(
    x: Any, scale: Any, bias: Any, *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1, opset: int = 21
) -> Any:
    if opset < 21:
        raise Unsupported("before opset 21, whose meaning was withdrawn")
    return F.group_norm(x, num_groups, scale, bias, epsilon)


def _batch_norm(
    x: Any, scale: Any, bias: Any, mean: Any, var: Any, *, epsilon: float = 1e-5, momentum: float = 0.9,
    training_mode: int = 0, spatial: int = 1,
) -> Any:  # fmt: skip
    if training_mode:
        raise Unsupported("in training mode")
    return F.batch_norm(x, mean, var, scale, bias, False, 0.0, epsilon)


def _sides(pads: Sequence[int] | None, auto_pad: str, x: torch.Tensor, kernel: Sequence[int], strides: Sequence[int],
           dilations: Sequence[int]) -> list[int]:  # fmt: skip
    """Padding before and after each axis, the last axis first, as F.pad takes it."""
    n = len(kernel)
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        both: list[tuple[int, int]] = []
        for size, k, s, d in zip(x.shape[2:], kernel, strides, dilations, strict=True):
            total = max(0, ((size + s - 1) // s - 1) * s + (k - 1) * d + 1 - size)
            less = total // 2
            both.append((less, total - less) if auto_pad == "SAME_UPPER" else (total - less, less))
    elif pads is None or auto_pad == "VALID":
        both = [(0, 0)] * n
    else:
        both = [(pads[i], pads[i + n]) for i in range(n)]
    return [p for pair in reversed(both) for p in pair]


def _dropout(x: Any, ratio: Any = None, training: Any = None, *, seed: int = 0, outputs: int = 1, **how: Any) -> Any:
    if training is not None and training is not False and (not isinstance(ratio, float) or ratio):
        raise Unsupported("in training mode")
    return (x, torch.ones_like(x, dtype=torch.bool))[:outputs]


def _conv(
    x: Any, w: Any, b: Any = None, *, auto_pad: str = "NOTSET", dilations: Any = None, group: int = 1,
    kernel_shape: Any = None, pads: Any = None, strides: Any = None,
) -> Any:  # fmt: skip
    n = x.ndim - 2
    strides, dilations = list(strides or [1] * n), list(dilations or [1] * n)
    sides = _sides(pads, auto_pad, x, w.shape[2:], strides, dilations)
    before, after = sides[0::2][::-1], sides[1::2][::-1]
    if before != after:
        x, before = F.pad(x, sides), [0] * n
    return torch.convolution(x, w, b, strides, before, dilations, False, [0] * n, group)


def _conv_transpose(
    x: Any, w: Any, b: Any = None, *, auto_pad: str = "NOTSET", dilations: Any = None, group: int = 1,
    kernel_shape: Any = None, output_padding: Any = None, output_shape: Any = None, pads: Any = None,
    strides: Any = None,
) -> Any:  # fmt: skip
    n = x.ndim - 2
    pads = list(pads or [0] * 2 * n)
    if auto_pad != "NOTSET" or output_shape is not None or pads[:n] != pads[n:]:
        raise Unsupported("with this padding")
    return torch.convolution(
        x, w, b, list(strides or [1] * n), pads[:n], list(dilations or [1] * n), True, list(output_padding or [0] * n),
        group,
    )  # fmt: skip


_MAX: dict[int, Row] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_MEAN: dict[int, Row] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def _max_pool(
    x: Any, *, kernel_shape: Any, auto_pad: str = "NOTSET", ceil_mode: int = 0, dilations: Any = None, pads: Any = None,
    storage_order: int = 0, strides: Any = None, outputs: int = 1,
) -> Any:  # fmt: skip
    n = x.ndim - 2
    strides, dilations = list(strides or [1] * n), list(dilations or [1] * n)
    if outputs > 1 or n not in _MAX:
        raise Unsupported("with these outputs")
    sides = _sides(pads, auto_pad, x, kernel_shape, strides, dilations)
    x = F.pad(x, sides, value=float("-inf")) if any(sides) else x
    return _MAX[n](x, list(kernel_shape), strides, 0, dilations, bool(ceil_mode))


def _average_pool(
    x: Any, *, kernel_shape: Any, auto_pad: str = "NOTSET", ceil_mode: int = 0, count_include_pad: int = 0,
    dilations: Any = None, pads: Any = None, strides: Any = None,
) -> Any:  # fmt: skip
    n = x.ndim - 2
    strides = list(strides or [1] * n)
    sides = _sides(pads, auto_pad, x, kernel_shape, strides, [1] * n)
    if n not in _MEAN or any(d != 1 for d in dilations or ()) or sides[0::2] != sides[1::2]:
        raise Unsupported("with this padding or dilation")
    return _MEAN[n](x, list(kernel_shape), strides, sides[0::2][::-1], bool(ceil_mode), bool(count_include_pad))


def _cumsum(x: Any, axis: Any, *, exclusive: int = 0, reverse: int = 0) -> Any:
    x = tensor(x)
    at = axis_of(number(axis), x.ndim)
    turned = x.flip(at) if reverse else x
    found = torch.cumsum(turned, at, dtype=x.dtype)
    found = found - turned if exclusive else found
    return found.flip(at) if reverse else found


def _arg(op: Row) -> Row:
    def row(x: Any, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Any:
        if not select_last_index:
            return op(x, axis, bool(keepdims))
        return x.shape[axis] - 1 - op(x.flip(axis), axis, bool(keepdims))

    return row


def _top_k(x: Any, k: Any, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> Any:
    x = tensor(x)
    axis = axis_of(axis, x.ndim)
    order = torch.sort(x, dim=axis, descending=bool(largest), stable=True)  # the first of equals comes first
    return tuple(y.narrow(axis, 0, number(k)) for y in order)


def _scaled(n: Any, s: Any) -> Any:
    """The size that an axis of size n has after it was resized by s."""
    return n * int(s) if isinstance(s, float) and s.is_integer() else torch.sym_int(n * s)


def _resize(
    x: Any, roi: Any = None, scales: Any = None, sizes: Any = None, *, mode: str = "nearest",
    coordinate_transformation_mode: str = "half_pixel", nearest_mode: str = "round_prefer_floor", **rest: Any,
) -> Any:  # fmt: skip
    known: Any = ()
    if sizes is None:
        known = scales if isinstance(scales, list) else tensor(scales).tolist()
        wanted = [_scaled(n, s) for n, s in zip(x.shape, known, strict=True)]
    else:
        wanted = integers(sizes)
    how = mode, coordinate_transformation_mode, nearest_mode if mode == "nearest" else ""
    kinds = {
        ("nearest", "asymmetric", "floor"): {"mode": "nearest"},
        ("linear", "half_pixel", ""): {"mode": "bilinear", "align_corners": False},
        ("linear", "pytorch_half_pixel", ""): {"mode": "bilinear", "align_corners": False},
        ("linear", "align_corners", ""): {"mode": "bilinear", "align_corners": True},
    }
    pairs = zip(x.shape, known, wanted, strict=True) if sizes is None and mode == "linear" else ()
    uneven = any(n * s != w for n, s, w in pairs)
    single = coordinate_transformation_mode == "pytorch_half_pixel" and any(n == 1 for n in wanted[2:])
    if uneven or single or how not in kinds or x.ndim != 4 or wanted[:2] != list(x.shape[:2]) or rest.get("antialias"):
        raise Unsupported(f"as {' '.join(how)}")
    return F.interpolate(x, size=wanted[2:], **kinds[how])


def _rotary(
    x: Any, cos: Any, sin: Any, positions: Any = None, *, interleaved: int = 0, num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Any:  # fmt: skip
    flat = x.ndim == 3
    x = x.unflatten(-1, (num_heads, -1)) if flat else x.transpose(1, 2)  # (batch, length, heads, d)
    n = rotary_embedding_dim or x.shape[-1]
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    cos, sin = (t[..., : n // 2].unsqueeze(2) for t in (cos, sin))
    turned, rest = x[..., :n], x[..., n:]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    parts = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    x = torch.cat([turned, rest], -1) if n != x.shape[-1] else turned
    return x.flatten(2) if flat else x.transpose(1, 2)


ROWS: dict[str, Row] = {
    "ArgMax": _arg(torch.argmax),
    "ArgMin": _arg(torch.argmin),
    "Attention": attention,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "CumSum": _cumsum,
    "Dropout": _dropout,
    "Einsum": lambda *xs, equation: torch.einsum(equation, *xs),
    "Gemm": _gemm,
    "GlobalAveragePool": lambda x: x.mean(list(range(2, x.ndim)), keepdim=True),
    "GroupNormalization": _group_norm,
    "InstanceNormalization": lambda x, w, b, *, epsilon=1e-5: F.instance_norm(x, None, None, w, b, True, 0.0, epsilon),
    "LayerNormalization": _layer_norm,
    "LogSoftmax": lambda x, **how: _softmax(x, log=True, **how),
    "MatMul": lambda a, b: torch.matmul(tensor(a), tensor(b)),
    "MaxPool": _max_pool,
    "RotaryEmbedding": _rotary,
    "RMSNormalization": _rms_norm,
    "ReduceL2": _reduction(lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keep)),
    "ReduceLogSumExp": _reduction(torch.logsumexp),
    "ReduceMax": _reduction(torch.amax),
    "ReduceMean": _reduction(torch.mean),
    "ReduceMin": _reduction(torch.amin),
    "ReduceProd": _reduction(_prod),
    "ReduceSum": _reduction(_sum),
    "ReduceSumSquare": _reduction(lambda x, axes, keep: _sum(x * x, axes, keep)),
    "Resize": _resize,
    "Softmax": _softmax,
    "TopK": _top_k,
}
