"""`attncc::kept_boxes`, the operator behind the boxes of a cache's pages, which are kept from call to call.

    kept_boxes(Tensor q, Tensor seen, Tensor shift, Tensor k, Tensor? written, int[] order, int size, SymInt count)
        -> Tensor

What it gives is what the node `boxes` means, of the keys as they are: a function of its arguments alone. Beside each
cache that a graph is given lie the least and largest components of its pages, with the visibility and the shift that
they were made with. A call renews the pages of which keys are seen that were not, or the other way round, and those
that the graph itself has written to (`written`, positions along the keys). Everything else that writes to a tensor
raises its version: where that is not the one which the last call left, or where a call finds no boxes (another cache, a
copy of one, another shift), they are made of all keys. Inference tensors have no version, and get no boxes. A write
through `.data` or NumPy raises none either, and is not seen.

    begin   before the graph runs: forget all where the version is another
    end     after it: note the version, forget what the graph did not renew
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch

from attncc.ir.boxes import bounds
from attncc.runtime.op import Kernel

#: Pages that are made at once: what a page is made of exists as float32 meanwhile.
_AT_ONCE = 256


T = TypeVar("T")


class Room:
    """The boxes beside one cache, by how they are read from it. `version` is that of the cache after the last call,
    `renewed` are the boxes of this one."""

    def __init__(self) -> None:
        self.version: int | None = None
        self.boxes: dict[object, Kept] = {}
        self.renewed: set[object] = set()

    def begin(self, cache: torch.Tensor) -> None:
        if self.version != cache._version:
            self.boxes.clear()
        self.version = None  # until the call is over, as it may fail half-way
        self.renewed.clear()

    def end(self, cache: torch.Tensor) -> None:
        for key in self.boxes.keys() - self.renewed:
            del self.boxes[key]
        self.version = cache._version


#: By the identity of the cache, which is told from one that takes its place by the reference.
_rooms: dict[int, tuple[weakref.ref[torch.Tensor], Room]] = {}
#: The rooms of the caches that the running graph was given, by where their memory is.
_open: ContextVar[Mapping[int, Room] | None] = ContextVar("attncc_kept_rooms", default=None)


def run_beside(caches: Sequence[torch.Tensor], run: Callable[[], T]) -> T:
    """What a graph gives that was given `caches`, writes to them only where `written` says, and before it reads."""
    tracked = [(x, _room(x)) for x in caches if x.device.type == "cpu" and not x.is_inference()]
    for x, room in tracked:
        room.begin(x)
    token = _open.set({x.untyped_storage().data_ptr(): room for x, room in tracked})
    try:
        found = run()
    finally:
        _open.reset(token)
    for x, room in tracked:
        room.end(x)
    return found


def _room(x: torch.Tensor) -> Room:
    """The room beside a cache, which goes with it."""
    key = id(x)
    known = _rooms.get(key)
    if known is not None and known[0]() is x:
        return known[1]
    room = Room()
    _rooms[key] = weakref.ref(x, lambda gone: _rooms.pop(key, None) if _is(key, gone) else None), room
    return room


def _is(key: int, gone: object) -> bool:
    """Whether what lies at a key is still that of a cache that is gone, and not of one that took its place."""
    known = _rooms.get(key)
    return known is not None and known[0] is gone


class Kept:
    """Boxes as float32 (b, h, p, d), and what they were made with: `was` of `seen`, and `shift`."""

    def __init__(self, x: Call) -> None:
        b, h, _, d = x.keys.shape
        self.least, self.largest = (torch.empty(b, h, x.count, d) for _ in range(2))
        self.was, self.shift = x.seen.clone(), x.shift.clone()
        self.dirty = torch.empty(b, h, x.count, dtype=torch.bool)
        self.lead = b, h
        self.whole = True

    def bounds(self, x: Call, kernel: Kernel | None) -> torch.Tensor:
        """(b, h, g, p), after what is not as it was is made anew."""
        if kernel is None:
            self.renew(x)
            found = bounds(x.q, self.least, self.largest)
        else:
            found = torch.empty((*x.q.shape[:-1], x.count))
            written = _NOWHERE if x.written is None else x.written
            sizes = [*self.lead, x.q.shape[2], *x.keys.shape[2:], x.count, x.size, written.numel(), int(self.whole)]
            given = x.q, x.keys, _over(x.seen, self.lead), _over(x.shift, self.lead), written
            own = self.least, self.largest, _over(self.was, self.lead), _over(self.shift, self.lead), self.dirty
            kernel(given, sizes, (*own, found))
        self.whole = False
        return found

    def renew(self, x: Call) -> None:
        """The same in plain torch: what the kernel is held against, and what runs where there is none."""
        if self.whole or not torch.equal(x.shift, self.shift):
            self._make(x, torch.arange(x.count))
        else:
            changed = (x.seen != self.was).flatten(0, -2).any(0).nonzero()[:, 0]
            if x.written is not None:
                changed = torch.cat([changed, x.written.reshape(-1) % x.keys.shape[2]])
            pages = torch.zeros(x.count, dtype=torch.bool)
            pages[((changed + x.shift.reshape(-1, 1)) // x.size).reshape(-1)] = True
            self._make(x, pages.nonzero()[:, 0])
        self.was.copy_(x.seen)
        self.shift.copy_(x.shift)

    def exact(self, x: Call) -> torch.Tensor:
        """The bounds in float64."""
        return bounds(x.q.double(), self.least.double(), self.largest.double())

    def _make(self, x: Call, pages: torch.Tensor) -> None:
        most, (b, h, m, d) = torch.finfo(torch.float32).max, x.keys.shape
        for first in range(0, len(pages), _AT_ONCE):
            some = pages[first : first + _AT_ONCE]
            at = (some * x.size)[:, None] + torch.arange(x.size) - x.shift[..., None, None]  # (b, h, p, r)
            there = (at >= 0) & (at < m)
            at = at.clamp(0, m - 1).flatten(2).expand(b, h, -1)
            shape = b, h, len(some), x.size, 1
            seen = x.seen.expand(b, h, m).gather(-1, at).reshape(shape) & there[..., None]
            keys = x.keys.gather(2, at[..., None].expand(-1, -1, -1, d)).float().reshape(*shape[:-1], d)
            any_seen = seen.any(-2)
            self.least[:, :, some] = torch.where(any_seen, torch.where(seen, keys, most).amin(-2), 0.0)
            self.largest[:, :, some] = torch.where(any_seen, torch.where(seen, keys, -most).amax(-2), 0.0)


@dataclass(frozen=True)
class Call:
    """A call with two dimensions of batch: q (b, h, g, d), keys (b, h, j, d), seen (b, h, j) and shift (b, h), of which
    the first two may be 1."""

    q: torch.Tensor
    keys: torch.Tensor
    seen: torch.Tensor
    shift: torch.Tensor
    written: torch.Tensor | None
    size: int
    count: int


def _call(
    q: torch.Tensor, seen: torch.Tensor, shift: torch.Tensor, k: torch.Tensor, written: torch.Tensor | None,
    order: Sequence[int], size: int, count: int,
) -> Call:  # fmt: skip
    keys = k if list(order) == _STRAIGHT and k.dim() == 4 else _ordered(k, order)
    while keys.dim() < 4:
        keys, seen, shift = keys[None], seen[None], shift[None]
    if written is not None and (written.dtype != torch.int64 or written.dim() != 1):
        written = written.reshape(-1).to(torch.int64)
    return Call(q.reshape(*keys.shape[:2], -1, q.shape[-1]), keys, seen, shift, written, size, count)


def _over(x: torch.Tensor, lead: tuple[int, int]) -> torch.Tensor:
    """`x` over both dimensions of the batch."""
    return x if x.shape[:2] == lead else x.expand(*lead, *x.shape[2:])


_STRAIGHT = [0, 1, 2, 3]
_NOWHERE = torch.empty(0, dtype=torch.int64)


def _ordered(k: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """(*lead, j, d): the dimensions of k as `attncc.ir.boxes.order_of` names them."""
    rest = [n for n in range(k.dim()) if n not in order]
    found = k.permute([*rest, *(n for n in order if n >= 0)])
    for _ in rest:
        found = found.select(0, 0)
    for n, place in enumerate(order):
        if place < 0:
            found = found.unsqueeze(n)
    return found


def _run(
    q: torch.Tensor, seen: torch.Tensor, shift: torch.Tensor, k: torch.Tensor, written: torch.Tensor | None,
    order: Sequence[int], size: int, count: int,
) -> torch.Tensor:  # fmt: skip
    with torch.no_grad():
        x = _call(q, seen, shift, k, written, order, size, count)
        rooms = _open.get()
        room = None if rooms is None else rooms.get(k.untyped_storage().data_ptr())
        key = tuple(order), k.shape, k.stride(), k.storage_offset(), seen.shape, shift.shape, size, count
        kept = None if room is None else room.boxes.get(key)
        kept = Kept(x) if kept is None else kept
        found = kept.bounds(x, _build(x.keys.dtype))
        if room is not None:
            room.boxes[key] = kept
            room.renewed.add(key)
        return found.reshape(*q.shape[:-1], count)


def _fake(
    q: torch.Tensor, seen: torch.Tensor, shift: torch.Tensor, k: torch.Tensor, written: torch.Tensor | None,
    order: Sequence[int], size: int, count: int,
) -> torch.Tensor:  # fmt: skip
    return q.new_empty((*q.shape[:-1], count), dtype=torch.float32)


Build = Callable[[torch.dtype], Kernel | None]


def _nothing(dtype: torch.dtype) -> Kernel | None:
    return None


_build: Build = _nothing


def install(build: Build) -> None:
    """Say how the kernel for keys of a dtype is made; None where there is none."""
    global _build
    _build = build


_torch_library = cast(Any, torch.library)  # whose functions have partial types
_library = _torch_library.Library("attncc", "FRAGMENT")
_library.define(
    "kept_boxes(Tensor q, Tensor seen, Tensor shift, Tensor k, Tensor? written, int[] order, int size, SymInt count)"
    " -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)
_library.impl("kept_boxes", _run, "CompositeExplicitAutograd")
_torch_library.register_fake("attncc::kept_boxes", _fake, lib=_library)
