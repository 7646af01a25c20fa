"""The kernel store: what was built once is found again, by content, in every later process.

    <root>/store-1/causal-bf16-d64-1f9a30c2b7d84e65/    one entry: what a build wrote, and manifest.json with checksums
    <root>/store-1/.records/<key>.json                  measurements
    <root>/store-1/.locks/  .building/  .quarantine/

An entry appears whole or not at all: it is built in a folder of its own and renamed into place, under a lock of its
key. Code is loaded from here, so folders are the owner's alone, and checksums are verified before a process first uses
an entry; what does not match is put aside and built again.
"""

from __future__ import annotations

import atexit
import errno
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, cast

import filelock
import platformdirs

VARIABLE = "ATTNCC_CACHE_DIR"
LIMIT_BYTES = 2 << 30
#: Longer than any build: who waits longer than this for another process stops waiting.
PATIENCE_S = 600.0
#: Entries used within the last hour are never pruned, and builds younger than this never swept: they may be in use.
RECENT_S = 3600.0
#: How long damaged entries are kept for whoever wants to know why.
QUARANTINE_S = 7 * 24 * 3600.0
_MANIFEST = "manifest.json"
_FULL = (errno.ENOSPC, errno.EDQUOT)


class StoreError(RuntimeError):
    """The store cannot do what was asked; the message says where, why, and what to do."""


@dataclass(frozen=True)
class Entry:
    """One build: its readable name, full key, folder, size in bytes, and when it was last used (seconds since 1970)."""

    name: str
    key: str
    path: Path
    size: int
    used: float


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
                raise TypeError(f"{where} has the name {name!r}, which is no text")
        return {cast(str, name): _stable(x, f"{where}.{name}") for name, x in items}
    raise TypeError(f"{where} is {value!r} of type {type(value).__name__}, which has no stable key")


class Store:
    """A folder of builds and measurements, shared by all processes of one user.

    `root` is by default the folder that ATTNCC_CACHE_DIR names, else the user's cache folder. Where it cannot be used,
    a folder for this process alone takes its place and `note` says why."""

    def __init__(self, root: Path | None = None, *, limit: int = LIMIT_BYTES) -> None:
        wanted = root or Path(os.environ.get(VARIABLE) or platformdirs.user_cache_dir("attncc"))
        self.limit = limit
        self.note: str | None = None
        try:
            self.root = _opened(wanted)
        except OSError as error:
            self.note = f"the cache folder {wanted} cannot be used ({error}); kernels of this process are kept apart"
            self.root = _opened(_temporary())
        self._verified: set[Path] = set()
        self._guard = Lock()

    def get_or_build(self, key: str, name: str, build: Callable[[Path], None]) -> Path:
        """The folder of the entry `key`, made by `build(empty folder)` if it is not there. `name` is for readers.

        Whatever `build` raises passes through and leaves nothing behind. Raises StoreError if the disk is full or
        another process holds the key for too long."""
        entry = self.find(key, name)
        if entry is not None:
            return entry
        try:
            if not (self.root / ".building").is_dir():  # someone emptied the cache folder by hand
                _opened(self.root.parent)
            with self._locked(key):
                entry = self.find(key, name)
                if entry is None:
                    entry = self._build(key, name, build)
            self.prune()
        except OSError as error:
            if error.errno in _FULL:
                raise StoreError(f"no space left for {self.root}: free some, or set {VARIABLE}") from error
            raise
        return entry

    def find(self, key: str, name: str) -> Path | None:
        """The folder of the entry `key`, or None if it is not there or not what was written."""
        path = self._path(key, name)
        with self._guard:
            known = path in self._verified
        if not known and not _intact(path, key):
            return None
        try:
            os.utime(path / _MANIFEST)
        except FileNotFoundError:  # removed since it was verified
            return None
        except OSError:  # a full disk or a read-only one: only the order of pruning suffers
            pass
        with self._guard:
            self._verified.add(path)
        return path

    def _path(self, key: str, name: str) -> Path:
        readable = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:80]
        return self.root / f"{readable or 'entry'}-{key[:16]}"

    def _build(self, key: str, name: str, build: Callable[[Path], None]) -> Path:
        path = self._path(key, name)
        with self._guard:
            self._verified.discard(path)
        self._put_aside(path)
        folder = Path(tempfile.mkdtemp(prefix=f"{path.name}-", dir=self.root / ".building"))
        try:
            build(folder)
            _seal(folder, key, name)
            folder.rename(path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # nothing is there after the rename
        with self._guard:
            self._verified.add(path)
        return path

    def _put_aside(self, path: Path) -> None:
        """Move an entry that failed its checks out of the way."""
        if os.path.lexists(path):
            aside = self.root / ".quarantine" / f"{path.name}-{time.time_ns()}"
            path.rename(aside)
            os.utime(aside, follow_symlinks=False)

    @contextmanager
    def _locked(self, key: str) -> Generator[None]:
        lock = filelock.FileLock(self.root / ".locks" / f"{key[:16]}.lock", timeout=PATIENCE_S, mode=0o600)
        try:
            with lock:
                yield
        except filelock.Timeout as error:
            raise StoreError(f"another process has held {lock.lock_file} for {PATIENCE_S:.0f} s") from error

    def remember(self, key: str, record: Mapping[str, object]) -> bool:
        """Keep a record of plain values under `key`, in place of any before. False if the disk refused.

        Raises TypeError for values that do not come back as they were."""
        plain = _stable(record, "record")
        text = json.dumps({"key": key, "digest": _digest_of(plain), "record": plain}, indent=1)
        try:
            handle, written = tempfile.mkstemp(prefix=key[:16], dir=self.root / ".building")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(text)
                Path(written).replace(self._record(key))
            finally:
                Path(written).unlink(missing_ok=True)
        except OSError:
            return False
        return True

    def recall(self, key: str) -> dict[str, Any] | None:
        """The record kept under `key`, or None if there is none or it was damaged."""
        try:
            read = cast(object, json.loads(self._record(key).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return None
        if not isinstance(read, dict):
            return None
        read = cast(dict[str, object], read)
        record = read.get("record")
        if not isinstance(record, dict) or read.get("key") != key:
            return None
        record = cast(dict[str, Any], record)
        return record if read.get("digest") == _digest_of(record) else None

    def _record(self, key: str) -> Path:
        return self.root / ".records" / f"{key}.json"

    def entries(self) -> list[Entry]:
        """All entries by name. Their checksums are not verified."""
        found: list[Entry] = []
        for path in sorted(self.root.iterdir()):
            manifest = None if path.name.startswith(".") else _manifest(path)
            if manifest is not None:
                try:
                    used = (path / _MANIFEST).stat().st_mtime
                    size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
                except FileNotFoundError:  # pruned by another process meanwhile
                    continue
                found.append(Entry(str(manifest["name"]), str(manifest["key"]), path, size, used))
        return found

    def clear(self) -> int:
        """Remove every entry, record and leftover; how many entries there were."""
        count = len(self.entries())
        with self._guard:
            self._verified.clear()
        for path in self.root.iterdir():
            if not path.name.startswith("."):
                self._remove(path)
        for folder in (".quarantine", ".records"):
            for path in (self.root / folder).iterdir():
                self._remove(path)
        self._sweep()
        return count

    def prune(self) -> int:
        """Remove the entries used longest ago until the rest is under the limit; how many were removed."""
        entries = self.entries()
        excess = sum(e.size for e in entries) - self.limit
        removed = 0
        for entry in sorted(entries, key=lambda e: e.used):
            if excess <= 0 or time.time() - entry.used < RECENT_S:
                break
            with self._guard:
                self._verified.discard(entry.path)
            self._remove(entry.path)
            excess -= entry.size
            removed += 1
        self._sweep()
        return removed

    def _remove(self, path: Path) -> None:
        """Out of sight first, so that no one finds half of it."""
        hidden = self.root / ".building" / f"removed-{path.name}-{time.time_ns()}"
        try:
            path.rename(hidden)
        except OSError:  # another process was quicker
            return
        _delete(hidden)

    def _sweep(self) -> None:
        """What killed processes left, and damaged entries of long ago."""
        for folder, kept_s in ((".building", RECENT_S), (".quarantine", QUARANTINE_S)):
            for path in (self.root / folder).iterdir():
                try:
                    old = time.time() - path.lstat().st_mtime > kept_s
                except FileNotFoundError:
                    continue
                if old:
                    _delete(path)


def _opened(wanted: Path) -> Path:
    """The store's own folder below `wanted`, made if need be. Raises OSError where it cannot be used."""
    wanted.mkdir(mode=0o700, parents=True, exist_ok=True)
    root = wanted.absolute() / "store-1"
    for path in (root, *(root / name for name in (".records", ".locks", ".building", ".quarantine"))):
        path.mkdir(mode=0o700, exist_ok=True)
        if hasattr(os, "getuid") and path.lstat().st_uid != os.getuid():
            raise PermissionError(f"{path} belongs to someone else")
        path.chmod(0o700)
    handle, probe = tempfile.mkstemp(dir=root / ".building")
    os.close(handle)
    Path(probe).unlink()
    return root


def _temporary() -> Path:
    """A folder that lives as long as this process."""
    path, owner = Path(tempfile.mkdtemp(prefix="attncc-")), os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # a forked child must not take its parent's kernels away
            shutil.rmtree(path, ignore_errors=True)

    atexit.register(remove)
    return path


def _seal(folder: Path, key: str, name: str) -> None:
    """Permissions of every file, and the manifest."""
    files: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise StoreError(f"a build made the link {path.name}; entries hold files alone")
        path.chmod(0o700 if path.is_dir() else 0o600)
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = _digest(path)
    text = json.dumps({"key": key, "name": name, "files": files}, indent=1)
    handle = os.open(folder / _MANIFEST, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)


def _manifest(path: Path) -> dict[str, object] | None:
    """The manifest of an entry, if it is there and has the right form."""
    try:
        read = cast(object, json.loads((path / _MANIFEST).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None
    if not isinstance(read, dict):
        return None
    read = cast(dict[str, object], read)
    return read if {"key", "name", "files"} <= set(read) and isinstance(read["files"], dict) else None


def _intact(path: Path, key: str) -> bool:
    """Whether every file of the entry is what its build wrote. Files that came later do not count."""
    manifest = _manifest(path)
    if manifest is None or manifest["key"] != key:
        return False
    try:
        return all(_digest(path / n) == want for n, want in cast(dict[str, str], manifest["files"]).items())
    except OSError:
        return False


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
