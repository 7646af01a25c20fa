"""The kernel store: what was built once is found again, by content, in every later process.

    <root>/store-2/causal-bf16-d64-1f9a30c2b7d84e65/    one entry: what a build wrote, and manifest.json with checksums
    <root>/store-2/.records/<key>.json                  measurements and checks
    <root>/store-2/.key  .locks/  .building/  .quarantine/

An entry appears whole or not at all: it is built in a folder of its own and renamed into place, under a lock of its
key. Code is loaded from here, so folders are the owner's alone, entries and records bear the seal of the store
(`attncc.runtime.store_seals`), and what is read is held against the manifest each time; what does not match is put
aside and built again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import platformdirs

from attncc.runtime.forks import Guard
from attncc.runtime.notices import notice
from attncc.runtime.store_files import distrust, parsed, read, way_is_safe, write
from attncc.runtime.store_locks import turn
from attncc.runtime.store_pruning import Entry, Pruning, entry_of, folders
from attncc.runtime.store_seals import Opened
from attncc.runtime.store_temporary import temporary

__all__ = ["VARIABLE", "BuildError", "Entry", "Store", "StoreError", "key"]

VARIABLE = "ATTNCC_CACHE_DIR"
LIMIT_BYTES = 2 << 30
#: Longer than a build: who waits longer than this for another process goes ahead without it.
PATIENCE_S = 90.0
#: The name says what was written by which format: a version with another one does not read it.
FOLDER = "store-2"
MANIFEST = "manifest.json"
#: Bytes of a file of an entry at most.
_LARGE = 1 << 30
_FULL = (errno.ENOSPC, errno.EDQUOT)
_log = logging.getLogger(__name__)


class StoreError(RuntimeError):
    """The store cannot do what was asked; the message says where, why, and what to do."""


class BuildError(RuntimeError):
    """A build that would fail again now: those who wait for it are told the same, and do not try it one by one."""


def key(parts: Mapping[str, object]) -> str:
    """A digest of `parts`: text, numbers, truth values, None, and sequences and mappings of these.

    Raises TypeError for anything else: an object without a stable text would give a key that finds nothing again, or
    the wrong thing."""
    text = json.dumps(_stable(parts, "key"), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _stable(value: object, where: str) -> object:
    # exact types: a subclass (an enum, a numpy scalar, a SymInt) may print as anything
    if value is None or type(value) in (str, int, bool):
        return value
    if type(value) is float and math.isfinite(value):
        return value
    if type(value) in (tuple, list):
        return [_stable(x, f"{where}[{n}]") for n, x in enumerate(cast(list[object], value))]
    if isinstance(value, Mapping):
        items = cast(Mapping[object, object], value).items()
        for name, _ in items:
            if type(name) is not str:
                raise TypeError(f"{where} has the name {name!r}, which is not text")
        return {cast(str, name): _stable(x, f"{where}.{name}") for name, x in items}
    raise TypeError(f"{where} is {value!r} of type {type(value).__name__}, which has no stable key")


class Store:
    """A folder of builds and measurements, shared by all processes of one user.

    `root` is by default the folder that ATTNCC_CACHE_DIR names, else the user's cache folder. Where it cannot be used,
    a folder for this process alone takes its place (`apart`); `note` says why, or why what was kept before is not
    used."""

    def __init__(self, root: Path | None = None, *, limit: int = LIMIT_BYTES) -> None:
        wanted = root or Path(os.environ.get(VARIABLE) or platformdirs.user_cache_dir("attncc"))
        self.limit = limit
        self.note: str | None = None
        self.apart = False
        self._guard = Guard()
        self._files: dict[Path, dict[str, str]] = {}  # of entries that were found: digests by name
        try:
            self._open(_below(wanted))
        except OSError as error:
            self.note = f"the cache folder {wanted} cannot be used ({error}); kernels of this process are kept apart"
            notice(self.note)
            self.apart = True
            self._open(temporary() / FOLDER)

    def _open(self, root: Path) -> None:
        opened = Opened(root)
        self.root, self._seal, self._opened = root, opened.seal, opened
        self.pruning = Pruning(root, self.limit)
        with self._guard():
            self._files.clear()
        if opened.emptied is not None:
            self.note = f"{opened.emptied}, so nothing that was kept there is used any more"
            notice(self.note)

    def _checked(self) -> None:
        """See that nobody else can write here. Raises OSError where that cannot be had."""
        if self._opened.out_of_order:
            self._open(self.root)

    def get_or_build(
        self, key: str, name: str, build: Callable[[Path], None], *, patience_s: float | None = None
    ) -> Path:
        """The folder of the entry `key`, made by `build(empty folder)` if it is not there. `name` is for readers.

        Whatever `build` raises passes through and leaves nothing behind; a BuildError is raised by all who waited for
        it. Who waits longer than `patience_s` builds for itself. Raises StoreError if the disk is full."""
        entry = self.find(key, name)
        if entry is not None:
            return entry
        try:
            self._checked()
            if not (self.root / ".building").is_dir():  # someone emptied the cache folder by hand
                self._open(self.root)
            since = time.time()
            lock = self.root / ".locks" / f"{key[:16]}.lock"
            with turn(lock, PATIENCE_S if patience_s is None else patience_s):
                entry = self.find(key, name)
                if entry is None:
                    self._raise_failure(key, since)
                    entry = self._build(key, name, build)
            self.pruning.if_due()
        except OSError as error:
            if error.errno in _FULL:
                raise StoreError(f"no space left for {self.root}: free some, or set {VARIABLE}") from error
            raise
        return entry

    def find(self, key: str, name: str) -> Path | None:
        """The folder of the entry `key`, or None if it is not there or not what was written."""
        path = self._path(key, name)
        try:
            self._checked()
        except OSError:
            return None
        files = self._intact(path, key)
        if files is None:
            return None
        with suppress(OSError):  # a full disk or a read-only one: only the order of pruning suffers
            os.utime(path / MANIFEST)
        with self._guard():
            self._files[path] = files
        return path

    def read(self, entry: Path, name: str) -> bytes:
        """What a build wrote into a file of an entry that was found. Raises StoreError where it no longer holds that;
        the entry is then put aside."""
        with self._guard():
            want = self._files.get(entry, {}).get(name)
        try:
            data = read(entry / name, _LARGE)
        except OSError as error:
            data, why = None, str(error)
        else:
            why = "it is not what was built"
        if data is None or want is None or hashlib.sha256(data).hexdigest() != want:
            self.discard(entry)
            raise StoreError(f"{entry / name}: {why}")
        return data

    def discard(self, entry: Path) -> None:
        """Put an entry aside, without what would make it one again."""
        with self._guard():
            self._files.pop(entry, None)
        try:
            aside = self._put_aside(entry)
            if aside is not None:
                (aside / MANIFEST).unlink(missing_ok=True)
        except OSError:
            _log.debug("%s could not be put aside", entry, exc_info=True)

    def _path(self, key: str, name: str) -> Path:
        readable = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:80]
        return self.root / f"{readable or 'entry'}-{key[:16]}"

    def _build(self, key: str, name: str, build: Callable[[Path], None]) -> Path:
        path = self._path(key, name)
        with self._guard():
            self._files.pop(path, None)
        folder = Path(tempfile.mkdtemp(prefix=f"{path.name}-", dir=self.root / ".building"))
        try:
            build(folder)
            files, size = self._manifest(folder, key, name)
            files = self._appear(folder, path, key, files)
        except BuildError as error:
            self.remember(_failure(key), {"at": time.time(), "why": str(error)})
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # nothing is there after the rename
        with self._guard():
            self._files[path] = files
        self.pruning.written += size
        return path

    def _appear(self, folder: Path, path: Path, key: str, files: dict[str, str]) -> dict[str, str]:
        """Put a built folder in its place; the digests of the files that are there then."""
        for _ in range(2):
            quicker = self._intact(path, key)  # someone who did not wait was
            if quicker is not None:
                return quicker
            self._put_aside(path)
            try:
                folder.rename(path)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    raise
            else:
                return files
        raise StoreError(f"{path} does not become what was built")

    def _raise_failure(self, key: str, since: float) -> None:
        """Raises BuildError if another process failed at this after `since`."""
        failure = self.recall(_failure(key))
        if failure is not None and float(failure.get("at", 0.0)) >= since:
            raise BuildError(str(failure.get("why")))

    def _manifest(self, folder: Path, key: str, name: str) -> tuple[dict[str, str], int]:
        """Permissions of every file, and the manifest; the digests and the bytes of all files."""
        files: dict[str, str] = {}
        size = 0
        for path in sorted(folder.rglob("*")):
            if path.is_symlink():
                raise StoreError(f"a build made the link {path.name}; entries hold files alone")
            path.chmod(0o700 if path.is_dir() else 0o600)
            if path.is_dir():
                continue
            data = read(path, _LARGE)
            files[path.relative_to(folder).as_posix()] = hashlib.sha256(data).hexdigest()
            size += len(data)
        write(folder / MANIFEST, self._seal.sealed({"key": key, "name": name, "files": files}), folder)
        return files, size

    def _intact(self, path: Path, key: str) -> dict[str, str] | None:
        """The digests of the files of an entry, if every one is what its build wrote. Files that came later do not
        count."""
        try:
            if distrust(path.lstat()) is not None:
                return None
            manifest = self._seal.opened(parsed(read(path / MANIFEST)))
            if manifest is None or manifest.get("key") != key or not isinstance(manifest.get("files"), dict):
                return None
            files = cast(dict[str, str], manifest["files"])
            if not files:
                return None
            right = all(hashlib.sha256(read(path / n, _LARGE)).hexdigest() == want for n, want in files.items())
            return files if right else None
        except OSError:
            return None

    def verify(self, entry: Entry) -> str | None:
        """What is wrong with an entry, None where every file is what its build wrote."""
        if self._intact(entry.path, entry.key) is not None:
            return None
        try:
            return distrust(entry.path.lstat()) or "is not what was built, or was not built by this user"
        except OSError as error:
            return str(error)

    def _put_aside(self, path: Path) -> Path | None:
        """Move an entry that failed its checks out of the way; where it lies now."""
        if not os.path.lexists(path):
            return None
        aside = self.root / ".quarantine" / f"{path.name}-{time.time_ns()}"
        path.rename(aside)
        os.utime(aside, follow_symlinks=False)
        return aside

    def remember(self, key: str, record: Mapping[str, object]) -> bool:
        """Keep a record of plain values under `key`, in place of any before. False if the disk refused.

        Raises TypeError for values that do not come back as they were."""
        plain = _stable(record, "record")
        try:
            self._checked()
            if self._record(key).is_dir():
                self.pruning.remove(self._record(key))
            write(self._record(key), self._seal.sealed({"key": key, "record": plain}), self.root / ".building")
        except OSError:
            return False
        return True

    def recall(self, key: str) -> dict[str, Any] | None:
        """The record kept under `key`, or None if there is none or it is not what was written."""
        try:
            self._checked()
            found = self._seal.opened(parsed(read(self._record(key))))
        except OSError:
            return None
        if found is None or found.get("key") != key or not isinstance(found.get("record"), dict):
            return None
        return cast(dict[str, Any], found["record"])

    def forget(self, key: str) -> None:
        """Keep no record under `key` any more."""
        self._record(key).unlink(missing_ok=True)

    def _record(self, key: str) -> Path:
        return self.root / ".records" / f"{key}.json"

    def records(self) -> int:
        """How many records are kept."""
        return sum(1 for _ in (self.root / ".records").iterdir())

    def entries(self) -> list[Entry]:
        """All entries by name. Neither seals nor checksums are verified."""
        found = (entry_of(path) for path in sorted(folders(self.root)))
        return [entry for entry in found if entry is not None]

    def clear(self) -> int:
        """Remove every entry, record and leftover; how many entries there were."""
        count = len(self.entries())
        with self._guard():
            self._files.clear()
        self.pruning.clear()
        return count

    def prune(self) -> int:
        """Remove the entries used longest ago until the rest is under the limit, and leftovers; how many entries were
        removed."""
        removed = self.pruning.all()
        with self._guard():
            for path in removed:
                self._files.pop(path, None)
        return len(removed)


def _below(wanted: Path) -> Path:
    """The store's own folder in the folder that was asked for, which is made if need be."""
    wanted.mkdir(mode=0o700, parents=True, exist_ok=True)
    home = wanted.resolve()
    why = way_is_safe(home)
    if why is not None:
        raise PermissionError(why)
    handle, probe = tempfile.mkstemp(dir=home)  # a folder that cannot be written to is of no use
    os.close(handle)
    Path(probe).unlink()
    return home / FOLDER


def _failure(key: str) -> str:
    return f"failed-{key}"
