"""`attncc cache`: the kernels that were built."""

from __future__ import annotations

import sys
from datetime import datetime
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from attncc.cli.output import Debug, clear_errors
from attncc.frontends.targets import TargetError, one_line
from attncc.report.model import WIDTH
from attncc.runtime.store import Store, StoreError


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove every kernel and every measurement.")] = False,
    debug: Debug = False,
) -> None:
    """Show the kernels that were built, in the order of their last use, or remove them."""
    with clear_errors(debug):
        try:
            store = Store()
            if store.note:
                raise TargetError(f"cache: {store.note}")
            if clear:
                print(f"removed {_kernels(store.clear())} from {store.root}")
                return
            entries = sorted(store.entries(), key=lambda entry: -entry.used)
        except (StoreError, OSError) as error:
            raise TargetError(f"cache: {one_line(error)}") from error
        table = Table("last used", "size", "kernel")
        for entry in entries:
            when = datetime.fromtimestamp(entry.used).isoformat(sep=" ", timespec="minutes")
            table.add_row(when, f"{entry.size / 1024:.0f} KiB", Text(entry.path.name))
        console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
        if entries:
            console.print(table)
        total = sum(entry.size for entry in entries) / 2**20
        console.print(Text(f"{_kernels(len(entries))}, {total:.1f} MiB, in {store.root}"), soft_wrap=True)


def _kernels(count: int) -> str:
    return f"{count} kernel" if count == 1 else f"{count} kernels"
