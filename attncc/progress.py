"""Saying what takes time while it happens: the driver reports steps, the command line shows the latest one.

Without `reporting()` around it, and wherever standard error is not a terminal, `step` does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

#: A stack, not a context variable: kernels may be built on threads, which do not inherit the context.
_listeners: list[Callable[[str], None]] = []


def step(text: str) -> None:
    """Report that `text` is being done now, for example `building 3 of 6 kernels`."""
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
def reporting(start: str = "reading the model", console: Console | None = None) -> Iterator[None]:
    """Show steps as a spinner on standard error."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(Text(start)) as status, listening(lambda text: status.update(Text(text))):
        yield
