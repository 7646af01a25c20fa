"""The tensors an attention gives: their shapes, dtypes and memory order, for real calls and for tracing alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from attncc.ir import Attention, Axis, Size, parse_attention
from attncc.ir.analysis import at_sizes
from attncc.ir.evaluate import DTYPE_OF, NAME_OF

#: What stands for an extent: a constant, or the place of a size in the call's `sizes`.
Extent = tuple[bool, int]


@dataclass(frozen=True)
class Shape:
    """One output: its extents, the order of its axes in memory (outermost first), and its dtype."""

    extents: tuple[Extent, ...]
    order: tuple[int, ...]
    dtype: torch.dtype

    def allocate(self, sizes: Sequence[int], device: torch.device) -> torch.Tensor:
        """An uninitialised tensor, dense in the memory order. `sizes` may be symbolic."""
        shape = [n if constant else sizes[n] for constant, n in self.extents]
        strides, step = [0] * len(shape), 1
        for at in reversed(self.order):
            strides[at] = step
            step = step * shape[at]
        return torch.empty_strided(shape, strides, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class Signature:
    """What a call needs to know of its spec, read once. `anchor` is the place of q's tensor, whose device is used."""

    attention: Attention
    shapes: tuple[Shape, ...]
    anchor: int

    def allocate(self, tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
        """Uninitialised outputs in the order of `attention.outputs`. Raises ValueError when the call has not the
        tensors and sizes that the spec declares."""
        a = self.attention
        if len(tensors) != len(a.tensors) or len(sizes) != len(a.sizes):
            raise ValueError(
                f"the attention declares {len(a.tensors)} tensors and {len(a.sizes)} sizes; "
                f"the call has {len(tensors)} and {len(sizes)}"
            )
        device = tensors[self.anchor].device
        return [shape.allocate(sizes, device) for shape in self.shapes]

    def check(self, tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> None:
        """Raises ValueError for a tensor that is not what the spec declares: a kernel would read outside it."""
        table = dict(zip(self.attention.sizes, sizes, strict=True))
        for declared, tensor in zip(self.attention.tensors, tensors, strict=True):
            least = [at_sizes(n, table) for n in declared.shape]
            fits = tensor.ndim == len(least) and all(a >= b for a, b in zip(tensor.shape, least, strict=True))
            if tensor.dtype != DTYPE_OF[declared.dtype] or not fits:
                dtype = NAME_OF.get(tensor.dtype, str(tensor.dtype))
                raise ValueError(
                    f"the attention declares {declared.name}: {declared.dtype}{least}, "
                    f"the call has {dtype}{list(tensor.shape)}"
                )


@lru_cache(maxsize=4096)
def signature_of(spec: str) -> Signature:
    """The plan of an attention's canonical text. Raises ParseError on anything else."""
    a = parse_attention(spec)
    anchor = next(at for at, t in enumerate(a.tensors) if t.name == a.q.tensor)
    return Signature(a, shapes_of(a), anchor)


def shapes_of(a: Attention) -> tuple[Shape, ...]:
    """The shapes of `a`'s outputs: `out` lies in memory as `a.layout` says, the others in the order of their axes."""
    axes: dict[str, tuple[Axis, ...]] = {
        "out": a.out_axes,
        "lse": (*a.batch, a.i),
        "weights": (*a.batch, a.i, a.j),
    }
    places = {size: at for at, size in enumerate(a.sizes)}

    def shape(name: str) -> Shape:
        names = [x.name for x in axes[name]]
        order = a.layout if name == "out" and a.layout else names
        extents = tuple(
            (False, places[x.extent]) if isinstance(x.extent, Size) else (True, int(x.extent.value)) for x in axes[name]
        )
        dtype = DTYPE_OF[a.compute_dtype if name == "lse" else a.dtype]
        return Shape(extents, tuple(names.index(n) for n in order), dtype)

    return tuple(shape(name) for name in a.outputs)
