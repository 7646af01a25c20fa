"""Failing on purpose: every function of attncc that a compilation calls can be made to raise at its first call."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import attncc

#: attncc's own folders: those of the driver, and those beside it that links lead to.
FOLDERS = tuple(
    str(p.resolve()) for p in (Path(attncc.__file__).parent, *Path(attncc.__file__).parent.iterdir()) if p.is_dir()
)


class Injected(RuntimeError):
    """What was made to happen."""


def name_of(code: CodeType) -> str:
    """`driver/edit.py:Editor.fuse`: where a function is, short enough for the name of a test."""
    path = Path(code.co_filename)
    return f"{path.parent.name}/{path.name}:{code.co_qualname}"


def _own(code: CodeType) -> bool:
    return code.co_filename.startswith(FOLDERS) and code.co_name.isidentifier()  # no comprehensions, no lambdas


@contextmanager
def recorded() -> Iterator[dict[str, CodeType]]:
    """The functions of attncc that are called inside, in the order of their first calls."""
    found: dict[str, CodeType] = {}

    def hook(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and _own(frame.f_code):
            found.setdefault(name_of(frame.f_code), frame.f_code)

    with _profiled(hook):
        yield found


@contextmanager
def failing(name: str) -> Iterator[list[str]]:
    """Inside, the function `name` raises Injected when it is first called; the list then holds its name."""
    happened: list[str] = []

    def hook(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and not happened and _own(frame.f_code) and name_of(frame.f_code) == name:
            happened.append(name)
            sys.setprofile(None)
            raise Injected(name)

    with _profiled(hook):
        yield happened


@contextmanager
def _profiled(hook: Callable[[FrameType, str, Any], None]) -> Iterator[None]:
    before = sys.getprofile()
    sys.setprofile(hook)
    try:
        yield
    finally:
        sys.setprofile(before)
