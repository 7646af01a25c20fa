"""Kernels that run on tokens in tile order, where a mask over a grid of tokens makes that less work.

    q, k, v  ->  to tiles  ->  kernel  ->  out, lse back to row-major order

Whether the copies pay is measured at the first call, on the call's own tensors, against the kernel in row-major order,
and remembered like every other choice.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from attncc.ir import Attention, print_attention
from attncc.ir.terms import loads
from attncc.passes.bounds.area import Area
from attncc.passes.rewrites.tile_choice import InTiles
from attncc.runtime.measure import choose, sampler_for, situation
from attncc.runtime.op import Kernel
from attncc.runtime.recent import Recent
from attncc.runtime.store import Store

_BUDGET_S = 0.1
#: Shapes whose choice is remembered here; the store remembers them all.
MOST_SHAPES = 256


class TileOrdered:
    """`tiled`, the kernel of `found`, with the tokens moved there and back, or `plain` where that is faster. `a` is the
    attention in row-major order."""

    def __init__(self, a: Attention, plain: Kernel, found: InTiles, tiled: Kernel, store: Callable[[], Store]) -> None:
        self.attention, self.plain, self.found, self.tiled = a, plain, found, tiled
        tokens = {a.i.index, a.j.index}
        names = [t.name for t in a.tensors]
        self._moved: dict[int, int] = {}  # tensor -> its dimension of tokens
        for access in (a.q, a.k, a.v):
            dims = [dim for dim, x in enumerate(access.index) if x in tokens]
            self._moved |= dict.fromkeys([names.index(access.tensor)], dims[0])
        self._tables: dict[torch.device, torch.Tensor] = {}
        self._store, self._faster = store, Recent[tuple[object, ...], bool](MOST_SHAPES)

    @property
    def note(self) -> str:
        """What a report says of it."""
        keys = f"{self.found.after:.0f} keys a row instead of {self.found.before:.0f}"
        if self._faster and not any(self._faster.values()):
            return f"tile order would visit {keys}, but is slower with its copies"
        return f"tokens in tiles of {' x '.join(map(str, self.found.order.tile))}: {keys}"

    def area(self, row_major: Area) -> Area:
        """The area that is visited, given that of the kernel in row-major order."""
        if self._faster and not any(self._faster.values()):
            return row_major
        keys = self.found.order.tokens
        return replace(row_major, visited=round(row_major.total * self.found.after / keys))

    def __call__(
        self, tensors: Sequence[torch.Tensor], sizes: Sequence[int], outputs: Sequence[torch.Tensor]
    ) -> None:
        (self.in_tiles if self._pays(tensors, sizes, outputs) else self.plain)(tensors, sizes, outputs)

    def _pays(self, tensors: Sequence[torch.Tensor], sizes: Sequence[int], outputs: Sequence[torch.Tensor]) -> bool:
        key = (tensors[0].device, torch.get_num_threads(), *sizes, *(t.shape for t in tensors))
        faster = self._faster.get(key)
        if faster is None:
            if os.environ.get("ATTNCC_TUNE", "").lower() in ("off", "0", "no"):
                return True
            faster = self._measured(tensors, sizes, outputs)
            self._faster[key] = faster
        return faster

    def in_tiles(
        self, tensors: Sequence[torch.Tensor], sizes: Sequence[int], outputs: Sequence[torch.Tensor]
    ) -> None:
        """The attention on tokens in tile order, copies included."""
        order, device = self.found.order, tensors[0].device
        if device not in self._tables:
            self._tables[device] = self.found.table.to(device)
        moved = [order.to_tiles(x, self._moved[n]) if n in self._moved else x for n, x in enumerate(tensors)]
        rows = len(self.attention.batch)  # the dimension of rows, of every output
        made = [torch.empty_like(x) for x in outputs]
        self.tiled([*moved, self._tables[device]], sizes, made)
        for x, given in zip(made, outputs, strict=True):
            seen = order.seen_in_tiles(given, rows)
            seen.copy_(x.unflatten(rows, seen.shape[rows : rows + 2 * len(order.grid)]))

    def _measured(
        self, tensors: Sequence[torch.Tensor], sizes: Sequence[int], outputs: Sequence[torch.Tensor]
    ) -> bool:
        device = tensors[0].device
        shape = [*sizes, *(n for t in tensors for n in t.shape)]
        candidates: dict[str, Callable[[], object]] = {
            "tile order": lambda: self.in_tiles(tensors, sizes, outputs),
            "row-major order": lambda: self.plain(tensors, sizes, outputs),
        }
        where = situation(print_attention(self.attention), shape, device, (repr(self.found.order), "row-major order"))
        chosen = choose(self._store(), where, candidates, ("tile order",), _BUDGET_S, sampler_for(device))
        return chosen.winner == "tile order"


def movable(a: Attention) -> str | None:
    """Why the tokens of `a` cannot be moved beside what else reads its operands, or None."""
    dims: dict[str, int] = {}
    for access in (a.q, a.k, a.v):
        found = [dim for dim, x in enumerate(access.index) if x in (a.i.index, a.j.index)]
        if len(found) != 1 or dims.setdefault(access.tensor, found[0]) != found[0]:
            return f"{access.tensor} is indexed by more than the token"
    read = {x.tensor for x in loads(a.score, a.mask, a.weight, *(x for x in (a.sink, a.drop) if x is not None))}
    return next((f"{name} is read by the score or the mask too" for name in dims if name in read), None)
