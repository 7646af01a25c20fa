"""Steps reach the innermost listener, and nobody where there is none."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO

import pytest
import torch
from rich.console import Console

from attncc.driver import backend
from attncc.progress import listening, reporting, step, waiting


def test_innermost_listener_hears() -> None:
    outer: list[str] = []
    inner: list[str] = []
    step("before")
    with listening(outer.append):
        step("a")
        with listening(inner.append):
            step("b")
        step("c")
    step("after")
    assert (outer, inner) == (["a", "c"], ["b"])


def test_silent_without_a_terminal() -> None:
    stream = StringIO()
    with reporting(console=Console(file=stream, force_terminal=False)):
        step("building")
    assert stream.getvalue() == ""


def terminal() -> tuple[Console, StringIO]:
    stream = StringIO()
    return Console(file=stream, force_terminal=True, width=80), stream


def test_what_is_quick_shows_nothing_and_what_is_slow_does() -> None:
    console, stream = terminal()
    with waiting(console, after=60.0):
        step("building 1 of 6 kernels")
    assert stream.getvalue() == ""
    with waiting(console, after=0.01):
        step("building 2 of 6 kernels")
        end = time.monotonic() + 30
        while "building 2 of 6 kernels" not in stream.getvalue() and time.monotonic() < end:
            time.sleep(0.01)
    assert "building 2 of 6 kernels" in stream.getvalue()
    ended = stream.getvalue()
    step("after")
    time.sleep(0.2)
    assert stream.getvalue() == ended


def test_whoever_listens_already_is_not_disturbed() -> None:
    console, stream = terminal()
    heard: list[str] = []
    with listening(heard.append), waiting(console, after=0.0):
        step("a")
    assert heard == ["a"] and stream.getvalue() == ""


def test_the_backend_says_what_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []

    @contextmanager
    def waits() -> Iterator[None]:
        with listening(heard.append):
            yield

    monkeypatch.setattr(backend, "waiting", waits)
    torch.compiler.reset()
    options = {"inductor": False, "measure": False}
    assert torch.compile(lambda x: x + 1, backend="attncc", options=options)(torch.ones(2)).tolist() == [2, 2]
    assert not heard  # nothing in it can be attention
    compiled = torch.compile(lambda x: (x @ x.mT).softmax(-1) @ x, backend="attncc", options=options)
    assert compiled(torch.ones(2, 3)).tolist() == [[1, 1, 1]] * 2
    assert heard[:2] == ["reading the graph", "finding attention"]


def test_shown_on_a_terminal() -> None:
    stream = StringIO()
    with reporting(console=Console(file=stream, force_terminal=True, width=80)):
        step("building [3] of 6 kernels")
    assert "building [3] of 6 kernels" in stream.getvalue()
