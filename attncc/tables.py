"""Kernels whose loop bounds read tables that each call makes from its masks' data.

Documents, padding and block masks bound a kernel's key loop through small tables (`attncc.passes.spans`). They cost a
few torch operations a call, so a call uses them from a size on where they are nothing beside the attention itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from attncc.ir.interpret import extent, size_table
from attncc.passes.spans import Spanned, tables
from attncc.runtime.op import Kernel

#: Pairs of a row and a key from which on tables are made: 1024 x 1024, some milliseconds for a kernel that skips none.
WORTHWHILE = 1 << 20


class Tabled:
    """`plain` for small calls; for large ones the kernel of `found`, built when the first of them comes."""

    def __init__(self, plain: Kernel, found: Spanned, build: Callable[[], Kernel]) -> None:
        self.plain, self.found = plain, found
        self._build = build
        self._skipping: Kernel | None = None
        given = found.attention.tensors
        self._own = len(given) - len(found.spans) - len(found.maps)
        self._names = [t.name for t in given[: self._own]]

    def __call__(
        self, tensors: Sequence[torch.Tensor], sizes: Sequence[int], outputs: Sequence[torch.Tensor]
    ) -> None:
        a = self.found.attention
        table = size_table(a, sizes)
        if extent(a.i.extent, table) * extent(a.j.extent, table) < WORTHWHILE:
            self.plain(tensors, sizes, outputs)
            return
        if self._skipping is None:
            self._skipping = self._build()
        made = tables(self.found, dict(zip(self._names, tensors, strict=True)), sizes)
        more = [made[t.name] for t in a.tensors[self._own :]]
        self._skipping([*tensors, *more], sizes, outputs)
