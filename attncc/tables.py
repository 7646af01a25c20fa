"""Kernels that first find out what a call's masks show, for calls large enough to gain by it.

Documents, padding and block masks bound a kernel's key loop through small tables (`attncc.passes.spans`), or on a GPU
through lists that kernels of its own make. Both cost a few launches a call, so a call uses them from a size on where
they are nothing beside the attention itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from attncc.ir import Attention
from attncc.ir.interpret import extent, size_table
from attncc.passes.spans import Spanned, tables
from attncc.runtime.op import Kernel

#: Pairs of a row and a key from which on tables are made: 1024 x 1024, some milliseconds for a kernel that skips none.
WORTHWHILE = 1 << 20


class BySize:
    """`plain` for small calls of `a`; for large ones the kernel that `build` gives, built when the first of them comes.
    """

    def __init__(self, a: Attention, plain: Kernel, build: Callable[[], Kernel]) -> None:
        self.attention, self.plain = a, plain
        self._build = build
        self._large: Kernel | None = None

    def __call__(
        self, tensors: Sequence[torch.Tensor], sizes: Sequence[int], outputs: Sequence[torch.Tensor]
    ) -> None:
        a, table = self.attention, size_table(self.attention, sizes)
        if extent(a.i.extent, table) * extent(a.j.extent, table) < WORTHWHILE:
            self.plain(tensors, sizes, outputs)
            return
        if self._large is None:
            self._large = self._build()
        self._large([*tensors, *self.more(tensors, sizes)], sizes, outputs)

    def more(self, tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
        """What the kernel for large calls is given beside the tensors of the attention."""
        return []


class Tabled(BySize):
    """The kernel for large calls is that of `found`, whose bounds read tables made for the call."""

    def __init__(self, plain: Kernel, found: Spanned, build: Callable[[], Kernel]) -> None:
        super().__init__(found.attention, plain, build)
        self.found = found
        given = found.attention.tensors
        self._own = len(given) - len(found.spans) - len(found.maps)
        self._names = [t.name for t in given[: self._own]]

    def more(self, tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
        made = tables(self.found, dict(zip(self._names, tensors, strict=True)), sizes)
        return [made[t.name] for t in self.attention.tensors[self._own :]]
