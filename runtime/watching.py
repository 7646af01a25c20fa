"""Who sees the calls of `attncc::attention` as they run: a recording that counts what is visited, a profiler that is
told names. Nobody, as a rule."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

import torch

#: (tensors, sizes, spec) of a call -> what its kernel runs in
Watcher = Callable[[Sequence[torch.Tensor], Sequence[int], str], AbstractContextManager[object]]

#: Who watches the calls of this thread.
watcher: ContextVar[Watcher | None] = ContextVar("attncc_watcher", default=None)


@contextmanager
def watched(by: Watcher) -> Generator[None]:
    """Calls meanwhile are seen by `by`."""
    token = watcher.set(by)
    try:
        yield
    finally:
        watcher.reset(token)
