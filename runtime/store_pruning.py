"""What the store holds, and keeping it within bounds: entries by size, records by number, leftovers by age.

Looking at everything is for who asks, and for a build once in an hour or after many megabytes; other builds look at the
time of one file.
"""

from __future__ import annotations

import logging
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from attncc.runtime.store_files import delete, parsed, read

#: Entries used within the last hour are never pruned, and builds younger than this never swept: they may be in use.
RECENT_S = 3600.0
#: How long damaged entries are kept for whoever wants to know why, and how many.
QUARANTINE_S, MOST_ASIDE = 7 * 24 * 3600.0, 64
#: Seconds between two looks at everything, and the part of the limit that a process writes between two.
BETWEEN_S, SHARE = 3600.0, 1 / 8
#: Records that are kept; those written longest ago go first, a quarter at once.
MOST_RECORDS = 8192
_MANIFEST, _LOOKED = "manifest.json", ".looked-at"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One build: its readable name, full key, folder, size in bytes, and when it was last used (seconds since 1970)."""

    name: str
    key: str
    path: Path
    size: int
    used: float


def folders(root: Path) -> Iterator[Path]:
    """The folders that may be entries."""
    try:
        yield from (x for x in root.iterdir() if not x.name.startswith("."))
    except FileNotFoundError:
        return


def entry_of(path: Path) -> Entry | None:
    """The entry in a folder, None where there is none."""
    try:
        manifest = parsed(read(path / _MANIFEST))
        if manifest is None or not {"key", "name", "files"} <= set(manifest):
            return None
        used = (path / _MANIFEST).stat().st_mtime
        return Entry(str(manifest["name"]), str(manifest["key"]), path, _size(path), used)
    except OSError:  # removed by another process meanwhile, or none
        return None


def _size(path: Path) -> int:
    return sum(x.lstat().st_size for x in path.rglob("*") if x.is_file())


class Pruning:
    """`written` are bytes of new entries since everything was looked at."""

    def __init__(self, root: Path, limit: int) -> None:
        self.root, self.limit, self.written = root, limit, 0

    def if_due(self) -> None:
        """`all`, if that has not been done for long. Costs the time of one file otherwise. Raises nothing: whoever
        builds is not concerned."""
        try:
            looked = (self.root / _LOOKED).lstat().st_mtime
        except OSError:
            looked = 0.0
        age = time.time() - looked
        if 0 <= age < BETWEEN_S and self.written < self.limit * SHARE:
            return
        try:
            self.all()
        except OSError:
            _log.debug("pruning %s failed", self.root, exc_info=True)

    def all(self) -> list[Path]:
        """Remove the entries used longest ago until the rest is under the limit, old records, and leftovers; the
        entries that were removed."""
        self._mark()
        self.written = 0
        found = [(used, size, path) for path in folders(self.root) for used, size in _use(path)]
        excess = sum(size for _, size, _ in found) - self.limit
        removed: list[Path] = []
        for used, size, path in sorted(found):
            if excess <= 0 or time.time() - used < RECENT_S:
                break
            self.remove(path)
            excess -= size
            removed.append(path)
        self._records()
        self._sweep()
        return removed

    def clear(self) -> None:
        """Remove everything."""
        for path in folders(self.root):
            self.remove(path)
        for folder in (".quarantine", ".records"):
            for path in (self.root / folder).iterdir():
                self.remove(path)
        self._sweep()

    def remove(self, path: Path) -> None:
        """Out of sight first, so that no one finds half of it."""
        hidden = self.root / ".building" / f"removed-{path.name[:100]}-{time.time_ns()}"
        try:
            path.rename(hidden)
        except OSError:  # another process was quicker
            return
        delete(hidden)

    def _mark(self) -> None:
        mark = self.root / _LOOKED
        if os.path.lexists(mark) and not stat.S_ISREG(mark.lstat().st_mode):
            self.remove(mark)
        handle = os.open(mark, os.O_WRONLY | os.O_CREAT | getattr(os, "O_NONBLOCK", 0), 0o600)
        os.close(handle)
        os.utime(mark)

    def _records(self) -> None:
        found = _by_age(self.root / ".records")
        if len(found) > MOST_RECORDS:
            for _, path in found[: len(found) - MOST_RECORDS * 3 // 4]:
                delete(path)

    def _sweep(self) -> None:
        """What killed processes left, and damaged entries of long ago."""
        now = time.time()
        for folder, kept_s in ((".building", RECENT_S), (".locks", RECENT_S), (".quarantine", QUARANTINE_S)):
            found = _by_age(self.root / folder)
            most = MOST_ASIDE if folder == ".quarantine" else len(found)
            for n, (time_of, path) in enumerate(found):
                if now - time_of > kept_s or n < len(found) - most:
                    delete(path)


def _by_age(folder: Path) -> list[tuple[float, Path]]:
    """What lies in a folder with its times, the oldest first."""
    found: list[tuple[float, Path]] = []
    try:
        with os.scandir(folder) as listed:
            for x in listed:
                try:
                    found.append((x.stat(follow_symlinks=False).st_mtime, Path(x.path)))
                except FileNotFoundError:
                    continue
    except FileNotFoundError:
        return []
    return sorted(found)


def _use(path: Path) -> list[tuple[float, int]]:
    """When an entry was last used, and its bytes; nothing for what is none."""
    try:
        return [((path / _MANIFEST).lstat().st_mtime, _size(path))]
    except OSError:
        return []
