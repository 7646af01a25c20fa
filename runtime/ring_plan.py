"""Which process works out which rows of an attention, and which keys it needs for them.

Rows and keys lie in runs of equal length on the processes of a group. A mask that hides keys leaves some runs of rows
more work than others, and some keys to nobody. Rows are parted in two chunks a process; chunks are paired, the one with
most to see and the one with least, where that makes the longest work shorter:

    causal, 4 processes       chunk          0  1  2  3  4  5  6  7        keys seen by each process
    rows where they lie       process        0  0  1  1  2  2  3  3        3  7 11 15
    paired                    process        0  1  2  3  3  2  1  0        9  9  9  9       (head and tail)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from attncc.ir import Attention, Expr, Size
from attncc.ir.analysis import linear_factor
from attncc.ir.attention import W, fresh_name
from attncc.ir.build import TRUE, add
from attncc.ir.expr import loads, mentions
from attncc.ir.merge import Merge, merge_of

#: Rows are sent to other processes where the longest work is longer by more than this without.
_WORTH_MOVING = 1.1


@dataclass(frozen=True)
class Places:
    """The rows and keys of an attention: the dimension of q's tensor that is its rows, and those of the tensors of keys
    and values that are its keys. Nothing else is read from these tensors."""

    q: str
    row: int
    keys: Mapping[str, int]


def places_of(a: Attention) -> Places | None:
    """Where the rows and keys of `a` lie, None where its parts over keys could not be put together again."""
    parts = a.normalizer != "softmax" or linear_factor(a.weight, W) is not None
    row = alone(a, a.q.tensor, "i")
    keys = {name: alone(a, name, "j") for name in (a.k.tensor, a.v.tensor)}
    if not parts or "weights" in a.outputs or row is None or None in keys.values() or a.q.tensor in keys:
        return None
    return Places(a.q.tensor, row, {name: d for name, d in keys.items() if d is not None})


def alone(a: Attention, tensor: str, axis: str) -> int | None:
    """The dimension of a tensor that is the rows ("i") or the keys ("j") of `a`, where it is read for nothing else."""
    x = a.i if axis == "i" else a.j
    others = {y.tensor for y in loads(*(e for e in (a.score, a.mask, a.weight, a.sink, a.drop) if e is not None))}
    read = [y for y in (a.q, a.k, a.v) if y.tensor == tensor]
    dims = {d for y in read for d, index in enumerate(y.index) if mentions(index, x.index)}
    if tensor in others or len(dims) != 1:
        return None
    (dim,) = dims
    plain = all(y.index[dim] is x.index for y in read)
    return dim if plain and a.tensor(tensor).shape[dim] is x.extent else None


def branch_of(a: Attention, places: Places, *, keys: bool, sink: bool = True) -> Attention:
    """`a` for some of its rows and, with `keys`, of its keys: its last sizes are the first row and how many there are,
    and the same for keys. Expressions see the numbers that rows and keys have in the whole."""
    taken = {x.name for x in (*a.axes, *a.sizes, *a.tensors)}
    first, rows, start, count = (Size(fresh_name(n, taken)) for n in ("first", "rows", "start", "keys"))
    table: dict[Expr, Expr] = {a.i.index: add(a.i.index, first)}
    moved = a.substitute(table | ({a.j.index: add(a.j.index, start)} if keys else {}))
    cut = {places.q: (places.row, rows)} | ({n: (d, count) for n, d in places.keys.items()} if keys else {})
    tensors = tuple(
        replace(t, shape=tuple(cut[t.name][1] if d == cut[t.name][0] else n for d, n in enumerate(t.shape)))
        if t.name in cut else t for t in a.tensors
    )  # fmt: skip
    own = replace(
        moved, q=a.q, k=a.k, v=a.v, i=replace(a.i, extent=rows), tensors=tensors, sizes=(*a.sizes, first, rows),
        sink=moved.sink if sink else None,
    )  # fmt: skip
    if not keys:
        return own
    outputs = ("out", "lse") if a.normalizer == "softmax" else ("out",)
    return replace(
        own, j=replace(a.j, extent=count), sizes=(*own.sizes, start, count), outputs=outputs, layout=(),
        dtype=a.compute_dtype,
    )  # fmt: skip


def merge_over(a: Attention, branches: int) -> Merge:
    """What puts one more branch over keys to those before it. `branches`: how many those are. A row that sees nothing
    anywhere is NaN or zero in all of them, or the mean of all values, which have equal shares."""
    rows, dtype = (*a.batch, a.i), a.compute_dtype
    if a.normalizer != "softmax":
        return merge_of(a.sizes, rows, (a.e,), 2, how="sum", dtype=dtype)
    before = branches / (branches + 1)
    empty = (before, 1 - before) if a.empty == "mean" else (1.0, 1.0)
    return merge_of(a.sizes, rows, (a.e,), 2, outputs=("out", "lse"), empty=empty, dtype=dtype, weigher=dtype)


@dataclass(frozen=True)
class Plan:
    """`owner` of each chunk of rows; `needs`: whether a chunk needs the keys of each process."""

    owner: tuple[int, ...]
    needs: tuple[tuple[bool, ...], ...]

    @property
    def per_process(self) -> int:
        return len(self.owner) // len(self.needs[0])

    def home(self, chunk: int) -> int:
        """The process on which the rows of a chunk lie."""
        return chunk // self.per_process

    def owned(self, process: int) -> list[int]:
        return [chunk for chunk, owner in enumerate(self.owner) if owner == process]

    def wants(self, process: int, keys: int) -> bool:
        """Whether a process needs the keys of another one."""
        return any(self.needs[chunk][keys] for chunk in self.owned(process))


def chunks_of(rows: int, count: int) -> int:
    """Two chunks a process, where they are equal."""
    return 2 * count if rows % (2 * count) == 0 else count


def plan_of(a: Attention, seen: Sequence[Sequence[int]], count: int) -> Plan:
    """The plan for `seen`: how many pairs each chunk of rows sees with the keys of each process."""
    work = [sum(row) for row in seen]
    needs = [[n > 0 or not _skips(a) for n in row] for row in seen]
    lying = [chunk * count // len(seen) for chunk in range(len(seen))]
    owner = _paired(work, count) if len(seen) == 2 * count else lying
    if _longest(work, lying, count) <= _WORTH_MOVING * _longest(work, owner, count):
        step = len(seen) // count
        needs = [[any(x) for x in zip(*needs[at : at + step], strict=True)] for at in range(0, len(seen), step)]
        owner = list(range(count))
    for chunk, row in enumerate(needs):  # rows that see nothing are still written, from keys that are there
        row[owner[chunk]] = row[owner[chunk]] or not any(row)
    return Plan(tuple(owner), tuple(map(tuple, needs)))


def _skips(a: Attention) -> bool:
    """Whether keys that no row of a chunk sees count for nothing: the mean of a row that sees none is over all."""
    return a.mask is not TRUE and (a.normalizer != "softmax" or a.empty != "mean")


def _longest(work: Sequence[int], owner: Sequence[int], count: int) -> int:
    return max(sum(w for w, own in zip(work, owner, strict=True) if own == p) for p in range(count))


def _paired(work: Sequence[int], count: int) -> list[int]:
    """The owner of each chunk, the chunk with most work and the one with least going together, to a process that has
    one of the two where it is free."""
    order = sorted(range(2 * count), key=lambda chunk: (work[chunk], chunk))
    owner, free = [0] * (2 * count), list(range(count))
    for at in range(count):
        pair = order[at], order[-1 - at]
        chosen = next((chunk // 2 for chunk in pair if chunk // 2 in free), None)
        if chosen is None:
            chosen = free[0]
        free.remove(chosen)
        for chunk in pair:
            owner[chunk] = chosen
    return owner
