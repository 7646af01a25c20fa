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
from attncc.kernels.snapshots import Snapshot, kept
from attncc.passes.bounds.block_maps import BlockMap, by_pair, map_tables, share
from attncc.passes.tables.spans import Spanned, tables
from attncc.runtime.op import Kernel
from attncc.runtime.recent import Recent

#: Pairs of a row and a key from which on tables are made: 1024 x 1024, some milliseconds for a kernel that skips none.
#: On a CPU, numbers of keys and values as well: 8 heads of 1024 keys of 64, half a millisecond of reading.
WORTHWHILE = 1 << 20
#: Of the time that attending to a pair takes: what looking at it costs a byte, and what leaving its mask alone saves.
LOOKING_COSTS, FULL_SAVES = 0.25, 0.3
#: Calls for which a mask that showed little is not looked at again, at most, or one that changed is not copied again.
MOST_RESTS = 64
#: Sizes and places in memory that are remembered: those that never come back must not pile up.
MOST_PLACES = 256


def work_of(a: Attention, sizes: Sequence[int]) -> int:
    """Pairs of a row and a key, or numbers of keys and values: a cache is mostly empty, and read for one row."""
    table = size_table(a, sizes)
    held = set[Expr]().union(*(free(x) for x in (*a.k.index, *a.v.index)))
    heads = prod(extent(x.extent, table) for x in a.batch if x.index in held)
    read = heads * extent(a.j.extent, table) * (extent(a.d.extent, table) + extent(a.e.extent, table))
    return max(extent(a.i.extent, table) * extent(a.j.extent, table), read)


class BySize:
    """`plain` for small calls of `a`; for large ones the kernel that `build` gives, built when the first of them comes.
    """

    def __init__(self, a: Attention, plain: Kernel, build: Callable[[], Kernel]) -> None:
        self.attention, self.plain = a, plain
        self._build = build
        self._large: Kernel | None = None
        self._work = Recent[tuple[int, ...], int](MOST_PLACES)

    def __call__(
        self, tensors: Sequence[torch.Tensor], sizes: Sequence[int], outputs: Sequence[torch.Tensor]
    ) -> None:
        known = tuple(sizes)
        work = self._work.get(known)
        if work is None:
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
        self._places = Recent[tuple[int, ...], _Place](MOST_PLACES)

    def work(self, sizes: Sequence[int]) -> int:
        """Pairs, or what there is to read."""
        return work_of(self.attention, sizes)

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
        made = kept.find(self, sources, sizes)
        if made is None:
            snapshot = Snapshot.of(sources)
            made = tables(self._cheap, self._held(named, self._sources, snapshot), sizes)
            kept.keep(self, snapshot, sizes, made)
        return made

    def _summaries(
        self, tensors: Sequence[torch.Tensor], named: dict[str, torch.Tensor], sizes: Sequence[int]
    ) -> dict[str, torch.Tensor] | None:
        """The maps of what holds one value a pair, None where the mask that lies there lately showed too little."""
        looked_at = [tensors[n] for n in self._looked_at]
        at = tuple(x.data_ptr() for x in looked_at)
        place = self._places.get(at, _Place())
        if place.rest > 0:
            self._places[at] = replace(place, rest=place.rest - 1)
            return None
        made = kept.find((self, at), looked_at, sizes)
        if made is not None:
            return made
        snapshot = Snapshot.of(looked_at) if place.stays else None
        made = map_tables(self._dense, self.attention, self._held(named, self._looked_at, snapshot), sizes)
        pays = any(_pays(m, made[m.tensor.name], self.attention, sizes) for m in self._dense)
        if pays and snapshot is not None:
            kept.keep((self, at), snapshot, sizes, made)
        self._places[at] = place.after(made, pays, snapshot is not None)
        return made if pays else None

    def _held(
        self, named: dict[str, torch.Tensor], sources: Sequence[int], snapshot: Snapshot | None
    ) -> dict[str, torch.Tensor]:
        """The tensors, with the copies that later calls are compared with in place of `sources`: another thread may
        write to those while something is made of them."""
        if snapshot is None:
            return named
        return named | dict(zip((self._names[n] for n in sources), snapshot.tensors, strict=True))


@dataclass(frozen=True)
class _Place:
    """What the masks at one place in memory showed so far. Replaced whole: threads lose a count at worst.

    `rest` is for how many more calls the mask is not looked at, `next_rest` for how many when it shows too little once
    more. `same` is how often in a row a look found what the one before had `shown`; from `enough` on, which doubles
    with each copy that was in vain, the mask is copied."""

    rest: int = 0
    next_rest: int = 1
    same: int = 0
    enough: int = 1
    copied: bool = False
    shown: dict[str, torch.Tensor] | None = None

    @property
    def stays(self) -> bool:
        """Whether the mask is likely to be the same in the next call."""
        return self.same >= self.enough and not self.copied

    def after(self, made: dict[str, torch.Tensor], pays: bool, copied: bool) -> _Place:
        """What is known after a look that showed `made`."""
        if not pays:
            return _Place(self.next_rest, min(2 * self.next_rest, MOST_RESTS), enough=self.enough)
        same = self.shown is not None and all(torch.equal(x, self.shown[name]) for name, x in made.items())
        return _Place(
            same=self.same + 1 if same and not self.copied else 0,
            enough=min(2 * self.enough, MOST_RESTS) if self.copied else self.enough,
            copied=copied,
            shown=made,
        )


def _pays(m: BlockMap, made: torch.Tensor, a: Attention, sizes: Sequence[int]) -> bool:
    """Whether what a map saves is more than what looking at the mask costs."""
    table = size_table(a, sizes)
    heads = prod(extent(x.extent, table) for x in a.batch if x.index not in m.index)
    read = sum(DTYPES[a.tensor(x.tensor).dtype][1] for x in loads(m.literal))
    left, full = share(made, m, extent(a.j.extent, table))
    unmasked = 0.0 if m.else_all else full * FULL_SAVES
    return 1 - left + unmasked > LOOKING_COSTS * read / heads
