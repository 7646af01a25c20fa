"""How many keys chunks of rows see of runs of keys, for work that is spread over processes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from attncc.codegen.torch_form import whole_ranges
from attncc.codegen.torch_keys import expressions, visited_keys
from attncc.ir import Attention, Bounds
from attncc.ir.expr import loads
from attncc.kernels.build import optimise
from attncc.kernels.snapshots import Snapshot, kept
from attncc.passes.bounds.bounds import loop_bounds
from attncc.passes.tables.spans import Spanned, reads_by_key, spanned, tables

#: Tiles of rows that a chunk is looked at in: what their bounds say of the whole chunk differs little from each row's.
_TILES = 8


def seen(
    a: Attention, tensors: Sequence[torch.Tensor], sizes: Sequence[int], chunks: int, runs: int
) -> Sequence[Sequence[int]]:
    """Pairs of a row and a key that the loop bounds leave of each chunk of rows and each run of keys. Of `tensors`
    those are read that bound the keys by data: documents, positions, padding; once for as long as they stay the same.
    """
    found = _bounded(a)
    if not isinstance(found, Spanned) and not any(loads(*expressions(found[1]))):
        return _counted_once(a, tuple(sizes), chunks, runs)
    read = {x.tensor for x in loads(a.mask)}
    sources = [x for t, x in zip(a.tensors, tensors, strict=True) if t.name in read]
    key = ("seen", a, chunks, runs)
    made = kept.find(key, sources, sizes)
    if made is None:
        snapshot = Snapshot.of(sources)
        made = {"counts": torch.tensor(_counted(found, tensors, sizes, chunks, runs))}
        kept.keep(key, snapshot, sizes, made)
    return made["counts"].tolist()


@lru_cache(maxsize=256)
def _bounded(a: Attention) -> Spanned | tuple[Attention, Bounds]:
    """The attention with its loop bounds, which where the mask reads data by key read tables made of that data."""
    a = optimise(a)
    if reads_by_key(a):
        found = spanned(a, by_looking="none")
        if found.spans or found.maps:
            return found
    return a, loop_bounds(a, rows=True)


@lru_cache(maxsize=256)
def _counted_once(a: Attention, sizes: tuple[int, ...], chunks: int, runs: int) -> tuple[tuple[int, ...], ...]:
    return _counted(_bounded(a), (), sizes, chunks, runs)


def _counted(
    found: Spanned | tuple[Attention, Bounds], tensors: Sequence[torch.Tensor], sizes: Sequence[int], chunks: int,
    runs: int,
) -> tuple[tuple[int, ...], ...]:  # fmt: skip
    a, bounds = (found.attention, found.bounds) if isinstance(found, Spanned) else found
    named = {t.name: x.detach().cpu() for t, x in zip(a.tensors, tensors, strict=False)}
    if isinstance(found, Spanned):
        named |= tables(found, named, sizes)
    table = dict(zip(a.sizes, sizes, strict=True))
    whole = whole_ranges(a, table)
    rows, keys = whole[a.i][1], whole[a.j][1]
    counts: list[tuple[int, ...]] = []
    for chunk in range(chunks):
        first, end = (rows * n // chunks for n in (chunk, chunk + 1))
        total = torch.zeros(runs, dtype=torch.int64)
        step = max(1, -(-(end - first) // _TILES))
        for at in range(first, end, step):
            cut = {**whole, a.i: (at, min(at + step, end))}
            visited = visited_keys(a, bounds, named, table, cut)
            numbers = torch.arange(*visited) if isinstance(visited, tuple) else visited
            total += torch.bincount(numbers * runs // keys, minlength=runs) * (cut[a.i][1] - at)
        counts.append(tuple(total.tolist()))
    return tuple(counts)
