"""Mappings that do not grow for ever."""

from __future__ import annotations

from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Recent(dict[K, V]):
    """A dict of the `most` items that were added last, for any number of threads: what is computed once for each key
    must not pile up where keys never come back. Looking up is what it is in a dict."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def __setitem__(self, key: K, value: V) -> None:
        super().__setitem__(key, value)
        self._shrink()

    def setdefault(self, key: K, default: V) -> V:  # type: ignore[override] # what is kept has a value
        """As of a dict: one value for all threads."""
        value = super().setdefault(key, default)
        self._shrink()
        return value

    def _shrink(self) -> None:
        while len(self) > self.most:
            try:
                self.pop(next(iter(self)), None)
            except (RuntimeError, StopIteration):  # another thread added or removed something just now
                continue
