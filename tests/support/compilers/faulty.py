"""Compilers that fail: scripts that stand in the place of g++."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest

#: Shell code by fault. `$out` is what `-o` names, `$real` the compiler that works; the source is the one `.cpp` file.
FAULTS = {
    "truncates": '"$real" "$@" || exit 1\n[ -n "$out" ] && truncate -s -1000 "$out"\nexit 0',
    "keeps half": '"$real" "$@" || exit 1\n[ -n "$out" ] && truncate -s $(($(stat -c %s "$out") / 2)) "$out"\nexit 0',
    "keeps a header": '"$real" "$@" || exit 1\n[ -n "$out" ] && truncate -s 64 "$out"\nexit 0',
    "empties": '"$real" "$@" || exit 1\n[ -n "$out" ] && : > "$out"\nexit 0',
    "writes nothing": '[ -n "$out" ] || exec "$real" "$@"\nexit 0',
    "writes text": '[ -n "$out" ] || exec "$real" "$@"\necho hello > "$out"',
    "makes a pipe": '[ -n "$out" ] || exec "$real" "$@"\nmkfifo "$out"',
    "renames the entry": 'exec "$real" -Dattncc_run=attncc_ran "$@"',
    "hides the entry": 'exec "$real" -DVISIBLE=hidden "$@"',
    "makes an object": '[ -n "$out" ] || exec "$real" "$@"\nexec "$real" "$@" -c -fno-openmp',
    "hangs": '[ -n "$out" ] || exec "$real" "$@"\nsleep 600 & sleep 600',
    "hangs always": "sleep 600 & sleep 600",
    "leaves a child": '"$real" "$@"\nstatus=$?\nsleep 600 &\nexit $status',
    "talks on": '[ -n "$out" ] || exec "$real" "$@"\nexec yes',
    "crashes": '[ -n "$out" ] || exec "$real" "$@"\nkill -SEGV $$',
}


def faulty(folder: Path, code: str) -> Path:
    """A compiler that runs shell code, or that of a fault by its name."""
    real = shutil.which("g++")
    if real is None:
        pytest.skip("no g++")
    path = folder / "faulty-g++"
    path.write_text(
        f"#!/bin/sh\nreal={shlex.quote(real)}\nout=\nlast=\n"
        'for x in "$@"; do [ "$last" = -o ] && out="$x"; last="$x"; done\n'
        f"{FAULTS.get(code, code)}\n"
    )
    path.chmod(0o755)
    return path


def miscompiling(folder: Path, change: str) -> Path:
    """A compiler that changes the source by a command of sed before it compiles."""
    code = (
        'for x in "$@"; do case "$x" in *kernel.cpp) sed -i ' + shlex.quote(change) + ' "$x";; esac; done\n'
        'exec "$real" "$@"'
    )
    return faulty(folder, code)
