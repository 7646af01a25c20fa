"""Loading the shared library that a compiler wrote, from bytes that were checked.

A library that was cut short ends a process that loads it (SIGBUS), and one that is changed or cut while it is loaded
ends it later. So its headers are read first, and what is loaded is a copy that no path leads to.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import tempfile
from contextlib import suppress
from itertools import count
from pathlib import Path

_MACHINES = {"x86_64": 62, "aarch64": 183}
_SHARED, _LOAD, _NO_BYTES = 3, 1, 8  # ET_DYN, PT_LOAD, SHT_NOBITS
_numbers = count()


class LibraryError(RuntimeError):
    """Bytes that are no library of this machine, or lack the function; the message says why."""


def load(data: bytes, name: str, function: str) -> ctypes.CDLL:
    """The library of these bytes, which has `function`. Raises LibraryError."""
    why = damage(data, function)
    if why is not None:
        raise LibraryError(f"{name} {why}")
    try:
        library = _loaded(data)
    except OSError as error:
        raise LibraryError(f"{name} cannot be loaded: {error}") from error
    try:
        getattr(library, function)
    except AttributeError:
        raise LibraryError(f"{name} has no {function}") from None
    return library


def damage(data: bytes, function: str) -> str | None:
    """What keeps bytes from being a whole 64-bit library of this machine that has a function, or None where nothing is
    seen to. Nothing is loaded."""
    if not data:
        return "is empty"
    why = _damage(data) if sys.platform == "linux" else None
    return f"has no {function}" if why is None and f"\0{function}\0".encode() not in data else why


def _damage(data: bytes) -> str | None:
    if data[:4] != b"\x7fELF":
        return "is no library"
    if len(data) < 64:
        return "is cut short"
    if data[4:6] != bytes((2, 1 if sys.byteorder == "little" else 2)):
        return "is for another kind of machine"
    kind, machine = struct.unpack_from("=HH", data, 16)
    if kind != _SHARED or machine != _MACHINES.get(os.uname().machine, machine):
        return "is for another kind of machine" if kind == _SHARED else "is no library"
    segments, sections = struct.unpack_from("=QQ", data, 32)
    size, number, section_size, section_number = struct.unpack_from("=HHHH", data, 54)
    if size != 56 or (section_number and section_size != 64):
        return "is damaged"
    if segments + size * number > len(data) or sections + section_size * section_number > len(data):
        return "is cut short"
    ends = [0]
    for at in range(segments, segments + size * number, size):
        if struct.unpack_from("=I", data, at)[0] == _LOAD:
            offset, _, _, held = struct.unpack_from("=QQQQ", data, at + 8)
            ends.append(offset + held)
    for at in range(sections, sections + section_size * section_number, 64):
        if struct.unpack_from("=I", data, at + 4)[0] not in (0, _NO_BYTES):
            ends.append(sum(struct.unpack_from("=QQ", data, at + 24)))
    if len(ends) == 1:
        return "is damaged"
    return "is cut short" if max(ends) > len(data) else None


def _loaded(data: bytes) -> ctypes.CDLL:
    if hasattr(os, "memfd_create"):
        with suppress(OSError):  # a system that runs nothing from memory
            return _from_memory(data)
    handle, path = tempfile.mkstemp(prefix="attncc-", suffix=".so")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        return ctypes.CDLL(path)
    finally:
        with suppress(OSError):  # Windows keeps what is loaded
            Path(path).unlink()


def _from_memory(data: bytes) -> ctypes.CDLL:
    handle = os.memfd_create("attncc-kernel", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(handle), "wb") as file:
            file.write(data)
        return ctypes.CDLL(_spelled(f"fd/{handle}"))
    finally:
        os.close(handle)


def _spelled(rest: str) -> str:
    """A path below /proc/self that was never used before: the C library takes what has the same path for the same
    library, and the numbers of files that are closed come back. The bits of a counter are written as `/` and `/.`."""
    bits = "".join("/." if bit == "1" else "/" for bit in f"{next(_numbers):b}")
    return f"/proc/self{bits}/{rest}"
