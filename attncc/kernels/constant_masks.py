"""What was found in buffers and parameters of a module, kept for as long as they stay as they are."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

#: Times that the same is found in a buffer before it is taken for constant.
FOUND_AGAIN = 64


@dataclass(frozen=True)
class Constant:
    """What `made` was made from: buffers and parameters, which nobody writes to but by operations that count.

    Compiled graphs count once a run, at its end, so that what lies in a buffer may change in the middle of one. Only
    after many calls that found the same, beyond any one run, is a buffer taken for constant; never again one that has
    been written to. Writes that do not count, through `.data` or NumPy, are not seen then."""

    sources: tuple[weakref.ref[torch.Tensor], ...]
    versions: tuple[int, ...]
    sizes: tuple[int, ...]
    made: dict[str, torch.Tensor]
    found: int = 1
    written: bool = False

    @staticmethod
    def after(
        before: Constant | None, sources: list[torch.Tensor], sizes: Sequence[int], made: dict[str, torch.Tensor]
    ) -> Constant:
        now = Constant(tuple(map(weakref.ref, sources)), _versions(sources), tuple(sizes), made)
        if before is None or not before.is_of(sources):
            return now
        same = before.sizes == now.sizes and all(torch.equal(x, made[name]) for name, x in before.made.items())
        written = before.written or before.versions != now.versions or (before.sizes == now.sizes and not same)
        return replace(now, found=before.found + 1 if same else 1, written=written)

    def is_of(self, sources: list[torch.Tensor]) -> bool:
        return all(x() is y for x, y in zip(self.sources, sources, strict=True))

    def holds(self, sources: list[torch.Tensor], sizes: Sequence[int]) -> bool:
        known = self.found >= FOUND_AGAIN and not self.written and self.sizes == tuple(sizes)
        return known and self.is_of(sources) and self.versions == _versions(sources)


def _versions(sources: list[torch.Tensor]) -> tuple[int, ...]:
    return tuple(-1 if x.is_inference() else x._version for x in sources)


def belongs_to_a_module(x: torch.Tensor) -> bool:
    """Dynamo marks the buffers and parameters that a graph gets as inputs."""
    return not x.is_inference() and getattr(x, "_dynamo_static_input_type", None) is not None
