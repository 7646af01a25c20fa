"""Steps reach the innermost listener, and nobody where there is none."""

from io import StringIO

from rich.console import Console

from attncc.progress import listening, reporting, step


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


def test_shown_on_a_terminal() -> None:
    stream = StringIO()
    with reporting(console=Console(file=stream, force_terminal=True, width=80)):
        step("building [3] of 6 kernels")
    assert "building [3] of 6 kernels" in stream.getvalue()
