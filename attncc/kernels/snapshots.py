"""What was made from tensors, used again for as long as they hold the same bytes.

A tensor can change without its version counting: written to through `.data`, NumPy, DLPack or its storage, or by a
compiled graph in the middle of a run. So what it holds is compared at each use, all of it, with a copy: a quarter of
the time that looking at a mask takes, and exact.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from threading import Lock

import torch

#: Bytes of copies that a process keeps, those of all kernels together.
MOST_KEPT = 1 << 26
#: Where elements lie apart, bytes between the first and the last that are compared for each byte of theirs, at most.
MOST_SPREAD = 2
#: Threads and bytes from which on torch's parallel comparison is faster than one thread's `memcmp`.
_THREADS, _BYTES = 4, 1 << 20

_memcmp = ctypes.CDLL("msvcrt" if sys.platform == "win32" else None).memcmp
_memcmp.argtypes, _memcmp.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t], ctypes.c_int


@dataclass(frozen=True)
class Snapshot:
    """The bytes of some tensors at one time. `tensors` are copies, of the same values in the same shapes."""

    tensors: tuple[torch.Tensor, ...]

    @staticmethod
    def of(tensors: Sequence[torch.Tensor]) -> Snapshot:
        return Snapshot(tuple(map(_copy, tensors)))

    @property
    def nbytes(self) -> int:
        return sum(x.untyped_storage().nbytes() for x in self.tensors)

    def holds(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether tensors have the dtypes, shapes, layouts and bytes of the copies."""
        return len(tensors) == len(self.tensors) and all(map(_same, self.tensors, tensors))


def _copy(x: torch.Tensor) -> torch.Tensor:
    if not _compact(x):
        return x.detach().clone(memory_format=torch.contiguous_format)
    return x.detach().as_strided((_span(x),), (1,)).clone().as_strided(x.shape, x.stride(), 0)


def _compact(x: torch.Tensor) -> bool:
    """Whether all memory between the first and the last element is compared, gaps included."""
    return x.device.type == "cpu" and _span(x) <= MOST_SPREAD * x.numel()


def _span(x: torch.Tensor) -> int:
    """Elements from the first to the last of a tensor, in memory."""
    return 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0


def _same(held: torch.Tensor, x: torch.Tensor) -> bool:
    if held.dtype != x.dtype or held.shape != x.shape or held.device != x.device:
        return False
    if not _compact(x):
        return torch.equal(*_numbers(held, x))
    return held.stride() == x.stride() and _same_bytes(held.data_ptr(), x.data_ptr(), _span(x) * x.itemsize)


def _same_bytes(a: int, b: int, count: int) -> bool:
    if count >= _BYTES and torch.get_num_threads() >= _THREADS and a % 8 == b % 8 == 0:
        words = count // 8
        x, y = (torch.frombuffer((ctypes.c_int64 * words).from_address(at), dtype=torch.int64) for at in (a, b))
        return torch.equal(x, y) and _memcmp(a + words * 8, b + words * 8, count % 8) == 0
    return _memcmp(a, b, count) == 0


def _numbers(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Tensors of one dtype and shape as whole numbers, the widest that all of them can be seen as."""
    width = tensors[0].itemsize
    if all(x.stride()[-1:] == (1,) for x in tensors):
        places = [n for x in tensors for n in (x.shape[-1], *x.stride()[:-1], x.storage_offset())]
        width = 8 if all(n * width % 8 == 0 for n in places) else width
    return [x.detach().view(_NUMBERS[width]) for x in tensors]


_NUMBERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class _Entry:
    snapshot: Snapshot
    sizes: tuple[int, ...]
    made: dict[str, torch.Tensor]

    @property
    def nbytes(self) -> int:
        return self.snapshot.nbytes + sum(x.nbytes for x in self.made.values())


class Kept:
    """What was made from snapshots, by the key of who made it; at most `most` bytes, the longest unused go first.

    For any number of threads."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.forget()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def find(
        self, key: Hashable, tensors: Sequence[torch.Tensor], sizes: Sequence[int]
    ) -> dict[str, torch.Tensor] | None:
        """What was made for these sizes, if the tensors hold what it was made from; else nothing is kept any more."""
        with self._lock:
            entry = self._entries.get(key)
        if entry is None:
            return None
        same = entry.sizes == tuple(sizes) and entry.snapshot.holds(tensors)
        with self._lock:
            if self._entries.get(key) is entry:
                if same:
                    self._entries.move_to_end(key)
                else:
                    self._drop(key)
        return entry.made if same else None

    def keep(self, key: Hashable, snapshot: Snapshot, sizes: Sequence[int], made: dict[str, torch.Tensor]) -> None:
        """Keep what was made from a snapshot, in place of what the key had."""
        entry = _Entry(snapshot, tuple(sizes), made)
        with self._lock:
            if key in self._entries:
                self._drop(key)
            if entry.nbytes > self.most:
                return
            self._entries[key] = entry
            self.nbytes += entry.nbytes
            while self.nbytes > self.most:
                self._drop(next(iter(self._entries)))

    def forget(self) -> None:
        """Keep nothing, as when new."""
        self._lock, self._entries, self.nbytes = Lock(), OrderedDict[Hashable, _Entry](), 0

    def _drop(self, key: Hashable) -> None:
        self.nbytes -= self._entries.pop(key).nbytes


#: Of this process. A child may be forked while a thread of its parent holds the lock.
kept = Kept(MOST_KEPT)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=kept.forget)
