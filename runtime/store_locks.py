"""One builder at a time for a key. The lock saves work and nothing else: entries appear whole whoever builds them, so
where there is no lock to be had, or its owner is stuck, one goes ahead without it.

The system frees the lock of a process that dies. Lock files are removed by who is done; who still waits for one that is
gone gets it, finds the entry, and builds nothing.
"""

from __future__ import annotations

import logging
import stat
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import filelock

from attncc.runtime.store_files import out_of_the_way

_log = logging.getLogger(__name__)


@contextmanager
def turn(path: Path, patience_s: float) -> Generator[bool]:
    """Wait for one's turn, `patience_s` seconds at most; whether the lock was had."""
    lock = _taken(path, patience_s)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            try:
                lock.release()
                path.unlink(missing_ok=True)
            except OSError:
                _log.debug("%s could not be removed", path, exc_info=True)


def _taken(path: Path, patience_s: float) -> filelock.BaseFileLock | None:
    for _ in range(2):
        _heal(path)
        held: int | None = None
        try:
            lock = filelock.FileLock(path, mode=0o600)
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                held = _inode(path)
                lock.acquire(timeout=patience_s)
            return lock
        except filelock.Timeout:
            _log.info("%s is held by a process that does not finish; it is taken over", path)
            if held is not None and _inode(path) == held:  # else another has taken it over and is at work
                path.unlink(missing_ok=True)
        except (OSError, NotImplementedError):  # NotImplementedError: a disk without locks
            _log.debug("no lock at %s", path, exc_info=True)
            return None
    return None


def _heal(path: Path) -> None:
    """Remove what lies in the place of a lock file and is no file."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            out_of_the_way(path)
    except OSError:
        return


def _inode(path: Path) -> int | None:
    try:
        return path.lstat().st_ino
    except OSError:
        return None
