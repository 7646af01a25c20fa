"""Rows of the op table that move elements and work on shapes."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.nn.functional as F

from attncc.frontends.onnx.values import (
    DTYPES,
    Unsupported,
    axes_of,
    axis_of,
    integers,
    is_number,
    number,
    of_constant,
    on_host,
    tensor,
)

Row = Callable[..., Any]


def _shape(x: Any, *, start: int = 0, end: int | None = None) -> Any:
    if on_host(x):
        return [] if is_number(x) else [len(x)]
    return list(x.shape)[slice(start, end)]


def _gather(x: Any, index: Any, *, axis: int = 0) -> Any:
    if isinstance(x, list) and on_host(index) and all(isinstance(n, int) for n in integers(index)):
        at = integers(index)
        if any(not -len(x) <= n < len(x) for n in at):
            raise Unsupported(f"an index of {len(x)} numbers is out of range")
        return x[at[0]] if is_number(index) else [x[n] for n in at]
    x = tensor(x)
    axis = axis_of(axis, x.ndim)
    if is_number(index):
        return x.select(axis, index)
    index = tensor(index)
    if index.dtype != torch.int64:
        index = index.long()
    if axis == 0 and x.ndim == 2 and isinstance(x, torch.nn.Parameter):
        return F.embedding(index, x)
    if index.ndim == 1:
        return x.index_select(axis, torch.where(index < 0, index + x.shape[axis], index))
    return x[(*(slice(None),) * axis, index)]


def _concat(*xs: Any, axis: int) -> Any:
    if all(isinstance(x, list) for x in xs):
        return [n for x in xs for n in x]
    return torch.cat([tensor(x) for x in xs], axis)


def _squeeze(x: Any, axes: Any = None) -> Any:
    if isinstance(x, list):
        if len(x) != 1:
            raise Unsupported(f"of {len(x)} numbers")
        return x[0]
    if is_number(x):
        return x
    x = tensor(x)
    if axes is None:
        axes = [n for n, s in enumerate(x.shape) if s == 1]
    return x.squeeze(axes_of(integers(axes), x.ndim))


def _unsqueeze(x: Any, axes: Any) -> Any:
    wanted = integers(axes)
    if is_number(x) and not isinstance(x, float) and len(wanted) == 1:
        return [x]
    x = tensor(x)
    for axis in sorted(axes_of(wanted, x.ndim + len(wanted))):
        x = x.unsqueeze(axis)
    return x


def _is_table(x: Any) -> bool:
    """Whether a value is rows of numbers known on the host: exporters reverse padding that way."""
    return isinstance(x, list) and len(x) > 0 and isinstance(x[0], list)


def _transpose(x: Any, *, perm: Any = None) -> Any:
    if _is_table(x):
        return [list(column) for column in zip(*x, strict=True)]
    x = tensor(x)
    return x.permute(perm or list(range(x.ndim))[::-1])


def _reshape(x: Any, shape: Any, *, allowzero: int = 0) -> Any:
    wanted = integers(shape)
    if isinstance(x, list) and len(wanted) == 1:
        return [n for row in x for n in row] if _is_table(x) else x
    if isinstance(x, list) and len(wanted) == 2 and type(wanted[1]) is int and wanted[1] > 0 and not _is_table(x):
        return [x[n : n + wanted[1]] for n in range(0, len(x), wanted[1])]
    if on_host(x) and wanted == []:
        return number(x)
    if is_number(x) and not isinstance(x, float | torch.SymFloat) and wanted in ([1], [-1]):
        return [x]
    x = tensor(x)
    if not allowzero:
        wanted = [x.shape[n] if type(s) is int and s == 0 and n < x.ndim else s for n, s in enumerate(wanted)]
    return x.reshape(wanted)


def _slice(x: Any, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Any:
    first, last = integers(starts), integers(ends)
    along = list(range(len(first))) if axes is None else integers(axes)
    by = [1] * len(first) if steps is None else integers(steps)
    if isinstance(x, list) and along == [0]:
        return x[slice(first[0], last[0], by[0])]
    x = tensor(x)
    for start, end, axis, step in zip(first, last, along, by, strict=True):
        axis = axis_of(axis, x.ndim)
        n = x.shape[axis]
        if type(step) is not int or step == 0:
            raise Unsupported("needs steps that are known and not zero")
        if step < 0:
            if type(n) is not int or type(start) is not int or type(end) is not int:
                raise Unsupported("backwards needs known sizes")
            at = range(n)[slice(start, None if end < -n else end, step)]
            x = x.index_select(axis, torch.arange(len(at)) * step + (at.start if len(at) else 0))
            continue
        if type(start) is int and start == 0 and type(end) is int and end >= 1 << 31 and step == 1:
            continue
        x = torch.ops.aten.slice.Tensor(x, axis, start, end if type(end) is not int else min(end, (1 << 63) - 1), step)
    return x


def _split(x: Any, split: Any = None, *, axis: int = 0, num_outputs: int | None = None, outputs: int = 0) -> Any:
    if isinstance(x, list):
        sizes = [len(x) // outputs] * outputs if split is None else integers(split)
        starts = [sum(sizes[:n]) for n in range(len(sizes))]
        return tuple(x[a : a + n] for a, n in zip(starts, sizes, strict=True))
    x = tensor(x)
    if split is not None:
        return tuple(x.split(integers(split), axis))
    count = num_outputs or outputs
    n = x.shape[axis_of(axis, x.ndim)]
    return tuple(x.split((n + count - 1) // count, axis))


def _expand(x: Any, shape: Any) -> Any:
    wanted = integers(shape)
    if on_host(x) and len(wanted) == 1 and type(wanted[0]) is int and wanted[0] <= 64:
        own = x if isinstance(x, list) else [x]
        return own * wanted[0] if len(own) == 1 else own
    x = tensor(x)
    own = [1] * (len(wanted) - x.ndim) + list(x.shape)
    wanted = [1] * (len(own) - len(wanted)) + wanted
    # an extent of 1 on either side is stretched to the other
    return x.expand([w if type(o) is int and o == 1 else o for o, w in zip(own, wanted, strict=True)])


def _range(start: Any, limit: Any, delta: Any) -> Any:
    start, limit, delta = number(start), number(limit), number(delta)
    return torch.arange(start, limit, delta)


def _filled(shape: Any, *, value: torch.Tensor | None = None) -> Any:
    wanted = integers(shape)
    fill = 0.0 if value is None else value.reshape(-1)[0].item()
    dtype = torch.float32 if value is None else value.dtype
    if dtype == torch.int64 and len(wanted) == 1 and type(wanted[0]) is int and wanted[0] <= 64:
        return [fill] * wanted[0]
    return torch.full(wanted, fill, dtype=dtype)


def _pad(x: Any, pads: Any, fill: Any = None, axes: Any = None, *, mode: str = "constant") -> Any:
    wanted = integers(pads)
    along = list(range(x.ndim)) if axes is None else axes_of(integers(axes), x.ndim)
    sides: list[Any] = [0] * (2 * x.ndim)
    for n, axis in enumerate(along):
        sides[2 * (x.ndim - 1 - axis)], sides[2 * (x.ndim - 1 - axis) + 1] = wanted[n], wanted[n + len(along)]
    names = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}
    if mode not in names:
        raise Unsupported(f"of the mode {mode!r}")
    while mode != "constant" and sides[-2:] == [0, 0]:
        sides = sides[:-2]
    if isinstance(fill, torch.Tensor):  # which only the data says
        inside = F.pad(torch.ones_like(x, dtype=torch.bool), sides)
        return torch.where(inside, F.pad(x, sides), fill.to(x.dtype))
    value = 0 if fill is None else number(fill)
    return F.pad(x, sides, names[mode], value if mode == "constant" else None)


def _tile(x: Any, repeats: Any) -> Any:
    if isinstance(x, list):
        times = number(repeats)
        if type(times) is not int or len(x) * times > _MOST_REPEATED:
            raise Unsupported(f"{times} times {len(x)} numbers")
        return x * times
    return tensor(x).repeat(integers(repeats))


#: Numbers on the host that a file may ask for.
_MOST_REPEATED = 1 << 16


def _trilu(x: Any, k: Any = 0, *, upper: int = 1) -> Any:
    return (torch.triu if upper else torch.tril)(x, number(k))


def _from_front(index: torch.Tensor, n: Any) -> torch.Tensor:
    """Places, those counted from the end too, as they are counted from the front."""
    return torch.where(index < 0, index + n, index).long()


def _gather_elements(x: Any, index: Any, *, axis: int = 0) -> Any:
    x = tensor(x)
    return torch.gather(x, axis, _from_front(tensor(index), x.shape[axis]))


def _gather_nd(x: Any, index: Any, *, batch_dims: int = 0) -> Any:
    index = tensor(index)
    if batch_dims:
        raise Unsupported("with batch dimensions")
    x = tensor(x)
    return x[index.unbind(-1)]


def _scatter_nd(x: Any, index: Any, updates: Any, *, reduction: str = "none") -> Any:
    if reduction not in ("none", "add"):
        raise Unsupported(f"with the reduction {reduction!r}")
    x, index, updates = tensor(x), tensor(index), tensor(updates)
    return x.index_put(index.unbind(-1), updates.to(x.dtype), accumulate=reduction == "add")


def _scatter_elements(x: Any, index: Any, updates: Any, *, axis: int = 0, reduction: str = "none") -> Any:
    x, index, updates = tensor(x), tensor(index), tensor(updates)
    index = _from_front(index, x.shape[axis])
    if reduction == "none":
        return x.scatter(axis, index, updates)
    names = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}
    return x.scatter_reduce(axis, index, updates, names[reduction])


def _constant(**attributes: Any) -> Any:
    ((name, value),) = attributes.items()
    if name == "value":
        return of_constant(value)
    if name in ("value_int", "value_float", "value_ints"):
        return list(value) if name == "value_ints" else value
    if name == "value_floats":
        return torch.tensor(value, dtype=torch.float32)
    raise Unsupported(f"a constant given as {name}")


def _one_hot(index: Any, depth: Any, values: Any, *, axis: int = -1) -> Any:
    index, values, n = tensor(index), tensor(values), number(depth)
    axis = axis_of(axis, index.ndim + 1)
    at = torch.arange(n).reshape([-1 if d == axis else 1 for d in range(index.ndim + 1)])
    return torch.where(torch.remainder(index, n).unsqueeze(axis) == at, values[1], values[0])


def _flatten(x: Any, *, axis: int = 1) -> Any:
    axis = axis_of(axis, x.ndim) if axis != x.ndim else axis
    return x.reshape(prod(x.shape[:axis]), prod(x.shape[axis:]))


def _depth_to_space(x: Any, *, blocksize: int, mode: str = "DCR") -> Any:
    b, c, h, w = x.shape
    n = blocksize
    if mode == "CRD":
        return F.pixel_shuffle(x, n)
    return x.reshape(b, n, n, c // (n * n), h, w).permute(0, 3, 4, 1, 5, 2).reshape(b, c // (n * n), h * n, w * n)


def _eye_like(x: Any, *, dtype: int | None = None, k: int = 0) -> Any:
    if k:
        raise Unsupported("off the diagonal")
    return torch.eye(x.shape[0], x.shape[1], dtype=x.dtype if dtype is None else DTYPES[dtype])


ROWS: dict[str, Row] = {
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _filled,
    "DepthToSpace": _depth_to_space,
    "Expand": _expand,
    "EyeLike": _eye_like,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "OneHot": _one_hot,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "Shape": _shape,
    "Size": lambda x: prod(_shape(x)),
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
}
