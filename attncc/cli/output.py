"""What the commands share: errors in one line, quiet while a model runs, printing for terminals and for pipes."""

from __future__ import annotations

import contextlib
import logging
import sys
import traceback
import warnings
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.console import Console
from rich.syntax import Syntax
from rich.text import Text

from attncc.errors import PlanError
from attncc.frontends.targets import TargetError
from attncc.report.model import Report

#: Of tables where there is no terminal to ask. Narrower ones fold the cells.
WIDTH = 160
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@contextlib.contextmanager
def clear_errors(debug: bool) -> Iterator[None]:
    try:
        yield
    except (TargetError, PlanError) as error:
        if debug:
            traceback.print_exc()
        Console(stderr=True, soft_wrap=True).print(Text(f"attncc: {error}", style="red"))
        raise typer.Exit(2) from None


@contextlib.contextmanager
def quiet(debug: bool) -> Iterator[None]:
    """What a model prints, logs and warns of while it loads and runs is not part of the answer."""
    level = logging.root.manager.disable
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        if not debug:
            warnings.simplefilter("ignore")
            logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(level)


def print_report(report: Report, *, every: bool = False) -> None:
    if sys.stdout.isatty():
        Console().print(report.table(every=every))
    else:
        print(report.text(every=every))


def print_text(console: Console, text: str) -> None:
    console.print(Text(text.rstrip("\n")))


def print_source(console: Console, source: str, language: str) -> None:
    """Highlighted on a terminal, byte for byte elsewhere so that it can be piped into a file."""
    if console.is_terminal:
        console.print(Syntax(source, language, background_color="default", word_wrap=False))
    else:
        print(source.rstrip("\n"))
