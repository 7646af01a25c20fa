"""The C++ compiler: finding one, and running it without waiting for ever.

`ATTNCC_CXX` or `CXX` names a program, or a command with words of its own (`ccache g++`). A compiler runs in a process
group, which is killed as a whole where it takes longer than `ATTNCC_COMPILE_TIMEOUT` seconds (60), or where the user
interrupts. On a busy machine, where it works but gets little of the processor, it has longer.
"""

from __future__ import annotations

import os
import selectors
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakSet

from attncc.runtime.store import BuildError

TIMEOUT = "ATTNCC_COMPILE_TIMEOUT"
TIMEOUT_S = 60.0
#: Bytes of a compiler's messages that are kept.
_MOST_SAID = 1 << 16
_running: set[subprocess.Popen[bytes]] = set()
_stopped: WeakSet[subprocess.Popen[bytes]] = WeakSet()
_stops = 0  # how often `stop` was called


class _Thread(threading.local):
    until: int | None = None


_thread = _Thread()
#: Programs that did not finish, and until when (on the monotonic clock) they are not waited for again.
_stuck: dict[str, float] = {}
_REST_S = 600.0
#: How often a compiler gets its time again, and the part of that which it must have worked.
_MORE, _LEAST_WORK = 9, 0.02


class CompileError(BuildError):
    """The compiler refused the source, or gave no kernel; the message is the compiler's, with its command."""


class Stopped(RuntimeError):
    """A compiler was stopped before it was done: that says nothing of it, and nothing is remembered."""


def timeout_s() -> float:
    """Seconds that a compiler may take."""
    try:
        given = float(os.environ.get(TIMEOUT, ""))
    except ValueError:
        return TIMEOUT_S
    return given if given > 0 else TIMEOUT_S


@dataclass(frozen=True)
class Command:
    """A program with its first words, the variable that names it, if any, and what was wrong with others."""

    words: tuple[str, ...]
    note: str = ""


def find() -> Command | str:
    """The compiler that `ATTNCC_CXX` or `CXX` names, else g++ or clang++; or why there is none."""
    wrong: list[str] = []
    for variable in ("ATTNCC_CXX", "CXX"):
        value = os.environ.get(variable, "").strip()
        if not value:
            continue
        found = _command(value)
        if not isinstance(found, str):
            return Command(found, _used(wrong, found))
        wrong.append(f"{variable}={value!r} {found}")
    for name in ("g++", "clang++"):
        path = shutil.which(name)
        if path is not None:
            return Command((path,), _used(wrong, (path,)))
    return "; ".join([*wrong, "no C++ compiler found (set CXX, or install g++ or clang++)"])


def _used(wrong: list[str], words: tuple[str, ...]) -> str:
    return f"{'; '.join(wrong)}: {' '.join(words)} is used" if wrong else ""


def _command(value: str) -> tuple[str, ...] | str:
    """The words of a command with the program's path, or what is wrong with it. A path may hold blanks."""
    whole = shutil.which(value)
    if whole is not None:
        return (whole,)
    try:
        words = shlex.split(value)
    except ValueError as error:
        return f"is not a command ({error})"
    path = shutil.which(words[0]) if words else None
    if path is not None:
        return (path, *words[1:])
    given = Path(value)
    if given.is_dir():
        return "is a folder"
    return "is not a program that can be run" if given.exists() else "is not found"


def run(command: Sequence[str], *, seconds: float | None = None, scratch: Path | None = None) -> tuple[int, str]:
    """The exit status of a command and what it said. Its temporary files go to `scratch`.

    Raises CompileError where it cannot be run or takes too long, Stopped where `stop` ends it."""
    limit = timeout_s() if seconds is None else seconds
    if time.monotonic() < _stuck.get(command[0], 0.0):
        raise CompileError(f"error: {command[0]} did not finish before, and is not tried again for a while")
    environment = None if scratch is None else {**os.environ, "TMPDIR": str(scratch)}
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment,
            process_group=0 if os.name == "posix" else None,
        )  # fmt: skip
    except OSError as error:
        raise CompileError(f"{command[0]} cannot be run: {error.strerror or error}") from error
    _running.add(process)
    try:
        if _thread.until not in (None, _stops):
            raise Stopped(f"{command[0]} was stopped")
        said = _heard(process, limit)
        if said is None:
            _stuck[command[0]] = time.monotonic() + _REST_S
            raise CompileError(f"error: {command[0]} did not finish within {limit:g} s ({TIMEOUT} sets how long)")
        if process in _stopped:
            raise Stopped(f"{command[0]} was stopped")
        return process.returncode, said
    finally:
        try:
            _kill(process)
        finally:  # also where a second interrupt comes while the first is being heard
            _running.discard(process)


def stops() -> int:
    """How often `stop` was called."""
    return _stops


def until_stopped(stops: int) -> None:
    """From now on this thread starts no compiler once `stop` was called more than `stops` times."""
    _thread.until = stops


def stop() -> None:
    """Kill the compilers that run now, and those that threads of `until_stopped` would start: the user interrupts."""
    global _stops
    _stops += 1
    for process in list(_running):
        _stopped.add(process)
        _kill(process)


def forget() -> None:
    """Try again what did not finish before."""
    _stuck.clear()


def _heard(process: subprocess.Popen[bytes], limit: float) -> str | None:
    """What a process says until it ends, None if that is too late. What it started may hold its pipe for longer."""
    assert process.stdout is not None
    kept, patience = bytearray(), _Patience(process, limit)
    with selectors.DefaultSelector() as selector, process.stdout as pipe:
        selector.register(pipe, selectors.EVENT_READ)
        ended = False
        while True:
            if selector.select(0.05):
                data = os.read(pipe.fileno(), 1 << 16)
                kept += data[: _MOST_SAID - len(kept)]
                if not data:
                    break
            elif ended:
                break
            ended = process.poll() is not None
            if not ended and patience.over():
                return None
    while process.poll() is None:  # it closed what it says with, and goes on
        if patience.over():
            return None
        time.sleep(0.005)
    return kept.decode(errors="replace")


class _Patience:
    """When a process has had its time. On a machine that is busy a compiler gets little of the processor: as long as it
    works on, and has not worked for its time, it is given as much again, a few times."""

    def __init__(self, process: subprocess.Popen[bytes], limit: float) -> None:
        self.group, self.limit = process.pid, limit
        self.until, self.worked, self.more = time.monotonic() + limit, 0.0, _MORE

    def over(self) -> bool:
        if time.monotonic() < self.until:
            return False
        worked = _processor_seconds(self.group)
        if not self.more or worked >= self.limit or worked < self.worked + self.limit * _LEAST_WORK:
            return True
        self.more, self.worked, self.until = self.more - 1, worked, time.monotonic() + self.limit
        return False


def _processor_seconds(group: int) -> float:
    """What the processes of a group have used of the processor, with those they waited for; 0 where that is not known.
    """
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if int(fields[2]) == group:
            ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK") if ticks else 0.0


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started."""
    with suppress(ProcessLookupError, PermissionError):
        if os.name == "posix":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()
