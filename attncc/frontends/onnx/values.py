"""Values of an ONNX graph as it runs in torch: tensors, and what is known on the host.

Shapes, and the arithmetic that makes shapes of them, stay integers and symbols: a number, or a list of them where ONNX
has a vector. A float without dimensions is a Python float, as it is in a torch program. Everything else is a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

#: What ONNX calls its element types, by number.
DTYPES: dict[int, torch.dtype] = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32, 7: torch.int64, 9: torch.bool,
    10: torch.float16, 11: torch.float64, 16: torch.bfloat16,
}  # fmt: skip
NUMBERS = {dtype: number for number, dtype in DTYPES.items()}
#: A longer vector of integers is data and no shape.
MOST_ON_HOST = 64


class Typed(float):
    """A number known on the host of another type than float32."""

    def __new__(cls, x: float, dtype: torch.dtype) -> Typed:
        made = super().__new__(cls, torch.tensor(x, dtype=dtype).item())
        made.dtype = dtype
        return made

    dtype: torch.dtype


def plain(x: Any) -> Any:
    """A value as torch's functions take it."""
    return float(x) if isinstance(x, Typed) else x


class Unsupported(Exception):
    """A node that has no row, or asks of one what it cannot do. The message is one line."""


def is_number(x: Any) -> bool:
    """Whether a value is a number known on the host."""
    return isinstance(x, int | float | bool | torch.SymInt | torch.SymFloat | torch.SymBool)


def on_host(x: Any) -> bool:
    return is_number(x) or isinstance(x, list)


def tensor(x: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A value as a tensor; integers are int64 and floats float32 where nothing else is asked for."""
    if isinstance(x, torch.Tensor):
        return x if dtype is None else x.to(dtype)
    if isinstance(x, list):
        if all(isinstance(n, int | float | bool) for n in x):
            return torch.tensor(x, dtype=dtype or (None if x else torch.int64))
        return torch.stack([tensor(n, dtype) for n in x])
    if dtype is None:
        real = isinstance(x, float | torch.SymFloat)
        dtype = torch.bool if isinstance(x, bool) else torch.float32 if real else torch.int64
        dtype = x.dtype if isinstance(x, Typed) else dtype
    return torch.full((), plain(x), dtype=dtype)


def integers(x: Any) -> list[Any]:
    """A value as a list of integers known on the host. Raises Unsupported where only the data says what they are."""
    if is_number(x):
        return [x]
    if isinstance(x, list):
        return x
    raise Unsupported("needs its sizes to follow from shapes, here only the data says them")


def number(x: Any) -> Any:
    """A value as a number known on the host. Raises Unsupported."""
    found = integers(x)
    if len(found) != 1:
        raise Unsupported(f"needs a number, not {len(found)} of them")
    return found[0]


def of_constant(x: torch.Tensor, numbers: bool = False) -> Any:
    """A constant as it takes part in a run: what can be a shape, floats without dimensions, and vectors that are said
    to be plain `numbers`, are known on the host."""
    if numbers and x.ndim == 1 and x.numel() <= MOST_ON_HOST:
        return x.tolist()
    if x.dtype == torch.int64 and x.ndim <= 1 and x.numel() <= MOST_ON_HOST:
        return x.tolist()
    if x.ndim == 0 and (x.is_floating_point() or x.dtype == torch.bool):
        return x.item() if x.dtype in (torch.float32, torch.bool) else Typed(x.item(), x.dtype)
    if x.dtype == torch.float32 and x.ndim == 1 and x.numel() == 1:
        return x.tolist()
    return x


def axis_of(axis: int, rank: int) -> int:
    """An axis counted from the front. Raises Unsupported where there is none."""
    if not -rank <= axis < max(rank, 1):
        raise Unsupported(f"has no axis {axis} among {rank}")
    return axis + rank if axis < 0 else axis


def axes_of(axes: Sequence[int], rank: int) -> list[int]:
    return [axis_of(a, rank) for a in axes]
