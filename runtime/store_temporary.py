"""A folder in the place of the cache, for as long as a process lives; those of processes that were killed are removed.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import filelock

_PREFIX, _ALIVE = "attncc-store-", ".alive"


def temporary() -> Path:
    """A new folder of this process. Its lock says that the process lives, wherever its number means something."""
    _sweep()
    path, owner = Path(tempfile.mkdtemp(prefix=_PREFIX)), os.getpid()
    alive = filelock.FileLock(path / _ALIVE, mode=0o600)
    alive.acquire()

    def remove() -> None:
        if os.getpid() == owner:  # a forked child must not take its parent's kernels away
            alive.release()
            shutil.rmtree(path, ignore_errors=True)

    atexit.register(remove)
    return path


def _sweep() -> None:
    try:
        left = [x for x in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*") if x.lstat().st_uid == os.getuid()]
    except (OSError, AttributeError):
        return
    for path in left:
        lock = filelock.FileLock(path / _ALIVE, mode=0o600)
        try:
            if not (path / _ALIVE).is_file():  # just being made
                continue
            lock.acquire(timeout=0)
        except (filelock.Timeout, OSError, NotImplementedError):
            continue
        shutil.rmtree(path, ignore_errors=True)
        lock.release()
