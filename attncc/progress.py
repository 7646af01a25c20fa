"""Saying what takes time while it happens: the driver reports steps, and the latest one is shown on the terminal.

The command line shows them at once, `torch.compile` from two seconds on. Nothing is shown where standard error is not a
terminal.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Timer
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_log = logging.getLogger(__name__)
#: A stack, not a context variable: kernels may be built on threads, which do not inherit the context.
_listeners: list[Callable[[str], None]] = []


def step(text: str) -> None:
    """Report that `text` is being done now, for example `building 3 of 6 kernels`, and log it."""
    _log.debug("%s", text)
    if _listeners:
        _listeners[-1](text)


@contextmanager
def listening(listener: Callable[[str], None]) -> Iterator[None]:
    """Send the steps reported inside the block to `listener`; blocks nest, the innermost one hears."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@contextmanager
def reporting(
    start: str = "reading the model", console: Console | None = None, *, after: float = 0.0
) -> Iterator[None]:
    """Show steps as a spinner on standard error once `after` seconds have passed."""
    if console is None and not sys.stderr.isatty():  # the library takes as long to import as the rest of attncc
        yield
        return
    from rich.console import Console  # noqa: PLC0415 - as above
    from rich.text import Text  # noqa: PLC0415 - as above

    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    status = console.status(Text(start))
    timer = Timer(after, status.start)
    timer.daemon = True
    if after > 0:
        timer.start()
    else:
        status.start()
    try:
        with listening(lambda text: status.update(Text(text))):
            yield
    finally:
        timer.cancel()
        if after > 0:
            timer.join()  # a display that is just beginning must not outlive this
        status.stop()


@contextmanager
def waiting(console: Console | None = None, after: float = 2.0) -> Iterator[None]:
    """Around what nobody asked to watch: as `reporting`, but not before `after` seconds, nor where someone listens."""
    if _listeners:
        yield
        return
    with reporting("compiling attention", console, after=after):
        yield
