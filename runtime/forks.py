"""Locks that a fork leaves open: a child has the thread that forked alone, and what others held is held for ever."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from threading import Lock, RLock
from weakref import WeakSet


class Guard:
    """A lock for `with guard():`, new in a forked child. A thread may take one that is `again` more than once."""

    def __init__(self, *, again: bool = False) -> None:
        self._make = RLock if again else Lock
        self._lock = self._make()
        _guards.add(self)

    @contextmanager
    def __call__(self) -> Generator[None]:
        with self._lock:  # the one that is taken is the one that is given back, whatever a fork put in its place
            yield

    def renew(self) -> None:
        self._lock = self._make()


_guards: WeakSet[Guard] = WeakSet()


def _forked() -> None:
    for guard in list(_guards):
        guard.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
