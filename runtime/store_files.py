"""Files and folders of the store that nobody else can have written: what is read, what is refused, what is put aside.

Whatever lies in the place of a file (a pipe, a link, a folder, gigabytes) is an OSError and never waited for.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
import time
from pathlib import Path

#: Bytes of a manifest, a record or the key at most.
SMALL = 1 << 20
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_POSIX = hasattr(os, "getuid")
_OPEN = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


def distrust(found: os.stat_result) -> str | None:
    """Why a file or folder may hold what others wrote, or None."""
    if not _POSIX:
        return None
    if found.st_uid != os.getuid():
        return "belongs to someone else"
    return "can be written to by others" if found.st_mode & _OTHERS_WRITE else None


def read(path: Path, most: int = SMALL) -> bytes:
    """The bytes of a regular file of this user, which nobody else can write to. Raises OSError for anything else."""
    handle = os.open(path, _OPEN | getattr(os, "O_BINARY", 0))
    with os.fdopen(handle, "rb") as file:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(f"{path} is not a regular file")
        why = distrust(found)
        if why is not None:
            raise PermissionError(f"{path} {why}")
        if found.st_size > most:
            raise OSError(f"{path} has {found.st_size} bytes, more than {most}")
        return file.read(most)


def parsed(data: bytes) -> dict[str, object] | None:
    """The JSON object that bytes hold, None where they hold none."""
    try:
        found: object = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return {str(k): v for k, v in found.items()} if isinstance(found, dict) else None  # pyright: ignore


def write(path: Path, data: bytes, scratch: Path) -> None:
    """Put a file of this user alone at `path`, whole or not at all; `scratch` is a folder on the same disk."""
    handle, written = tempfile.mkstemp(prefix=path.name[:16], dir=scratch)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(written).replace(path)
    finally:
        Path(written).unlink(missing_ok=True)


def way_is_safe(folder: Path) -> str | None:
    """Why others can put something else in the place of `folder`, an absolute path without links, or None.

    A folder on the way that others can write to is safe where it is sticky, as /tmp is, and where the others are the
    group that has the user's own name, as some systems set up for everyone."""
    if not _POSIX:
        return None
    for x in (folder, *folder.parents):
        found = x.stat()
        if found.st_mode & stat.S_ISVTX or not found.st_mode & _OTHERS_WRITE:
            continue
        if found.st_mode & stat.S_IWOTH or not _own_group(found.st_gid):
            return f"others can write to {x}"
    return None


def _own_group(group: int) -> bool:
    import grp  # noqa: PLC0415 - these two are not everywhere
    import pwd  # noqa: PLC0415

    try:
        return grp.getgrgid(group).gr_name == pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # numbers without names, in containers
        return group == os.getgid() == os.getuid()


def delete(path: Path) -> None:
    """Remove whatever lies at `path`, as far as the disk lets us."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return


def out_of_the_way(path: Path) -> None:
    """Remove what lies at `path`, at once for everybody who looks there. Raises OSError where it cannot be moved."""
    hidden = path.with_name(f"{path.name[:60]}.removed-{os.getpid()}-{time.time_ns()}")
    try:
        path.rename(hidden)
    except FileNotFoundError:
        return
    delete(hidden)


def is_folder(path: Path) -> bool:
    """Whether a folder, not a link to one, lies at `path`."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except FileNotFoundError:
        return False
