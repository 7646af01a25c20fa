"""Locks that a fork leaves open: a child has only the thread that forked, and what others held is held for ever."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from threading import Lock
from weakref import WeakSet


class Guard:
    """A lock for `with guard():`, new in a forked child."""

    def __init__(self) -> None:
        self._lock = Lock()
        _guards.add(self)

    @contextmanager
    def __call__(self) -> Generator[None]:
        with self._lock:  # the one that is taken is the one that is given back, whatever a fork put in its place
            yield

    def renew(self) -> None:
        self._lock = Lock()


_guards: WeakSet[Guard] = WeakSet()


def _forked() -> None:
    for guard in list(_guards):
        guard.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
