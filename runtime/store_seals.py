"""The seal of a store: a secret of its user, by which entries and records show that they were written by this user.

Checksums alone would not: whoever can write a file can write its checksum. The secret lies in the store, readable by
its user alone. A folder that others could write to, even for a while, may hold files of theirs, but none with a seal.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from attncc.runtime.forks import Guard
from attncc.runtime.store_files import is_folder, out_of_the_way, read, write

_KEY = ".key"
_LENGTH = 32
#: Below the root, each this user's alone.
FOLDERS = (".records", ".locks", ".building", ".quarantine")

_opening = Guard()


class Seal:
    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def of(self, value: object) -> str:
        """The seal of a value of plain JSON."""
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hmac.new(self._secret, text.encode(), hashlib.sha256).hexdigest()

    def sealed(self, value: Mapping[str, object]) -> bytes:
        """A JSON object with its seal, as it is written."""
        return json.dumps({**value, "seal": self.of(value)}, indent=1).encode()

    def opened(self, value: dict[str, object] | None) -> dict[str, object] | None:
        """The object that was sealed, None where the seal is not this one."""
        if value is None:
            return None
        rest = {name: x for name, x in value.items() if name != "seal"}
        try:
            given, right = str(value.get("seal")), self.of(rest)
        except (ValueError, RecursionError):
            return None
        return rest if hmac.compare_digest(given.encode(), right.encode()) else None


class Opened:
    """A store's folder that is in order, with its seal. `emptied` says why what was there before was thrown away."""

    def __init__(self, root: Path) -> None:
        """Make `root` and what is below it, or see that it is this user's alone. What others can write to is thrown
        away with all that is in it. Raises OSError where the folder cannot be used."""
        self.root = root
        self.emptied: str | None = None
        with _opening():  # of two threads that find the same thing wrong, one throws it away
            self._open(root)

    def _open(self, root: Path) -> None:
        for _ in range(3):  # another process may do the same
            why = _in_order(root)
            if why is None:
                secret = _secret(root)
                if secret is not None:
                    self.seal, self._secret_of = Seal(secret), _state(root / _KEY)
                    return
                why = f"{root / _KEY} was not this user's alone"
            self.emptied = why
            out_of_the_way(root)
        raise PermissionError(str(self.emptied))

    @property
    def out_of_order(self) -> bool:
        """Whether others can write here by now, or the store has another secret than this process knows."""
        try:
            found = self.root.lstat()
            secret = _state(self.root / _KEY)
        except OSError:
            return False  # gone: it is made again by who writes
        return _writable(found) or not stat.S_ISDIR(found.st_mode) or secret != self._secret_of


def _state(path: Path) -> tuple[int, int, int]:
    found = path.lstat()
    return found.st_ino, found.st_mtime_ns, found.st_mode


def _writable(found: os.stat_result) -> bool:
    return hasattr(os, "getuid") and bool(found.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def _in_order(root: Path) -> str | None:
    for path in (root, *(root / name for name in FOLDERS)):
        if os.path.lexists(path) and not is_folder(path):  # in this order: what another is making right now is right
            out_of_the_way(path)
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
        if hasattr(os, "getuid") and found.st_uid != os.getuid():
            raise PermissionError(f"{path} belongs to someone else")
        if _writable(found):
            return f"others could write to {path}"
        if stat.S_IMODE(found.st_mode) != 0o700:
            path.chmod(0o700)
    return None


def _secret(root: Path) -> bytes | None:
    """The secret of a store, made if there is none; None if others may know it, or it is no secret."""
    path = root / _KEY
    try:
        if not os.path.lexists(path):
            fresh = root / ".building" / f"{_KEY}-{os.getpid()}-{os.urandom(8).hex()}"
            write(fresh, os.urandom(_LENGTH), root / ".building")
            try:
                os.link(fresh, path)  # of two processes, both take the first one's
            except FileExistsError:
                pass
            except OSError:  # a disk without hard links
                fresh.replace(path)
            finally:
                fresh.unlink(missing_ok=True)
        found = path.lstat()
        if hasattr(os, "getuid") and (found.st_uid != os.getuid() or found.st_mode & 0o077):
            return None
        data = read(path, _LENGTH + 1)
    except PermissionError:
        return None
    return data if len(data) == _LENGTH else None
