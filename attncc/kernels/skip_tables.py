"""Kernels that first find out what a call's masks show, for calls large enough to gain by it.

Documents, padding and block masks bound a kernel's key loop through small tables (`attncc.passes.tables.spans`), or on
a GPU through lists that kernels of its own make. Both cost a few launches per call, so a call uses them from a size on
where they are nothing beside the attention itself. A mask given as a tensor, one value per pair, is summarised by
looking at all of it, a hundredth of the attention over several heads; where that shows little, calls go on without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch

from attncc.ir import Attention, Expr
from attncc.ir.attention import DTYPES
from attncc.ir.interpret import extent, size_table
from attncc.ir.terms import free, loads
from attncc.kernels.constant_masks import Constant, belongs_to_a_module
from attncc.passes.bounds.block_maps import BlockMap, by_pair, map_tables, share
from attncc.passes.tables.spans import Spanned, tables
from attncc.runtime.op import Kernel

#: Pairs of a row and a key from which on tables are made: 1024 x 1024, some milliseconds for a kernel that skips none.
#: On a CPU, numbers of keys and values as well: 8 heads of 1024 keys of 64, half a millisecond of reading.
WORTHWHILE = 1 << 20
#: Bytes of documents, padding or block masks that are kept to see whether the next call has the same.
MOST_KEPT = 1 << 26
#: Of the time that attending to a pair takes: what looking at it costs a byte, and what leaving its mask alone saves.
LOOKING_COSTS, FULL_SAVES = 0.25, 0.3
#: Calls for which a mask that showed little is not looked at again, at most.
MOST_RESTS = 64
#: Sizes and places in memory that are remembered: those that never come back must not pile up.
MOST_PLACES = 256


class BySize:
    """`plain` for small calls of `a`; for large ones the kernel that `build` gives, built when the first of them comes.
    """

    def __init__(self, a: Attention, plain: Kernel, build: Callable[[], Kernel]) -> None:
        self.attention, self.plain = a, plain
        self._build = build
        self._large: Kernel | None = None
        self._work: dict[tuple[int, ...], int] = {}

    def __call__(
        self, tensors: Sequence[torch.Tensor], sizes: Sequence[int], outputs: Sequence[torch.Tensor]
    ) -> None:
        known = tuple(sizes)
        work = self._work.get(known)
        if work is None:
            if len(self._work) >= MOST_PLACES:
                self._work.clear()
            work = self._work[known] = self.work(sizes)
        more = self.more(tensors, sizes) if work >= WORTHWHILE else None
        if more is None:
            self.plain(tensors, sizes, outputs)
            return
        if self._large is None:
            self._large = self._build()
        self._large([*tensors, *more], sizes, outputs)

    def work(self, sizes: Sequence[int]) -> int:
        """Pairs of a row and a key."""
        table = size_table(self.attention, sizes)
        return extent(self.attention.i.extent, table) * extent(self.attention.j.extent, table)

    def more(self, tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor] | None:
        """What the kernel for large calls is given beside the tensors of the attention, None for `plain` instead."""
        return []


class Tabled(BySize):
    """The kernel for large calls is that of `found`, whose bounds read tables made for the call, or for the call before
    if what they are made from is the same: layers share their documents and padding, and block masks may never change.
    """

    def __init__(self, plain: Kernel, found: Spanned, build: Callable[[], Kernel]) -> None:
        super().__init__(found.attention, plain, build)
        self.found = found
        self._dense = tuple(m for m in found.maps if by_pair(m.literal, found.attention))
        self._cheap = replace(found, maps=tuple(m for m in found.maps if m not in self._dense))
        given = found.attention.tensors
        self._own = len(given) - len(found.spans) - len(found.maps)
        self._names = [t.name for t in given[: self._own]]
        self._sources, self._looked_at = (
            [n for n, name in enumerate(self._names) if name in {x.tensor for t in made for x in loads(*t.sources)}]
            for made in ((*self._cheap.spans, *self._cheap.maps), self._dense)
        )
        self._last: tuple[list[int], list[torch.Tensor], dict[str, torch.Tensor]] | None = None
        self._rest: dict[tuple[int, ...], _Rest] = {}
        self._constants: dict[tuple[int, ...], Constant] = {}

    def work(self, sizes: Sequence[int]) -> int:
        """Pairs, or what there is to read of keys and values: a cache is mostly empty, and read for one row."""
        a, table = self.attention, size_table(self.attention, sizes)
        held = set[Expr]().union(*(free(x) for x in (*a.k.index, *a.v.index)))
        heads = prod(extent(x.extent, table) for x in a.batch if x.index in held)
        read = heads * extent(a.j.extent, table) * (extent(a.d.extent, table) + extent(a.e.extent, table))
        return max(super().work(sizes), read)

    def more(self, tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor] | None:
        named = dict(zip(self._names, tensors, strict=True))
        seen = self._summaries(tensors, named, sizes) if self._dense else {}
        if seen is None:
            return None
        made = self._tables(tensors, named, sizes) | seen
        return [made[t.name] for t in self.attention.tensors[self._own :]]

    def _tables(
        self, tensors: Sequence[torch.Tensor], named: dict[str, torch.Tensor], sizes: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        sources = [tensors[n] for n in self._sources]
        last = self._last
        if last is not None and last[0] == list(sizes) and all(map(_same, last[1], sources)):
            return last[2]
        made = tables(self._cheap, named, sizes)
        if sum(x.nbytes for x in sources) <= MOST_KEPT:
            self._last = list(sizes), [x.clone() for x in sources], made
        return made

    def _summaries(
        self, tensors: Sequence[torch.Tensor], named: dict[str, torch.Tensor], sizes: Sequence[int]
    ) -> dict[str, torch.Tensor] | None:
        """The maps of what holds one value a pair, None where the mask that lies there lately showed too little."""
        place = tuple(tensors[n].data_ptr() for n in self._looked_at)
        rest = self._rest.get(place, _Rest())
        if rest.left:
            rest.left -= 1
            return None
        looked_at = [tensors[n] for n in self._looked_at]
        constant = self._constants.get(place)
        if constant is not None and constant.holds(looked_at, sizes):
            return constant.made
        made = map_tables(self._dense, self.attention, named, sizes)
        if any(_pays(m, made[m.tensor.name], self.attention, sizes) for m in self._dense):
            self._rest.pop(place, None)
            if all(map(belongs_to_a_module, looked_at)):
                if len(self._constants) >= MOST_PLACES:
                    self._constants.clear()
                self._constants[place] = Constant.after(constant, looked_at, sizes, made)
            return made
        if len(self._rest) >= MOST_PLACES:
            self._rest.clear()
        self._rest[place] = _Rest(rest.after, min(2 * rest.after, MOST_RESTS))
        return None


@dataclass
class _Rest:
    """For how many more calls a mask is not looked at; `after` it has shown too little once more, for how many."""

    left: int = 0
    after: int = 1


def _pays(m: BlockMap, made: torch.Tensor, a: Attention, sizes: Sequence[int]) -> bool:
    """Whether what a map saves is more than what looking at the mask costs."""
    table = size_table(a, sizes)
    heads = prod(extent(x.extent, table) for x in a.batch if x.index not in m.index)
    read = sum(DTYPES[a.tensor(x.tensor).dtype][1] for x in loads(m.literal))
    left, full = share(made, m, extent(a.j.extent, table))
    unmasked = 0.0 if m.else_all else full * FULL_SAVES
    return 1 - left + unmasked > LOOKING_COSTS * read / heads


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Compared by what they hold: compiled graphs write into tensors without a trace."""
    return a.device == b.device and a.dtype == b.dtype and torch.equal(a, b)
