"""`attncc cache`: the kernels that were built, and the measurements and checks that were made."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from attncc.cli.output import WIDTH, Debug, clear_errors, print_source
from attncc.frontends.targets import TargetError, one_line
from attncc.runtime.store import Entry, Store, StoreError

cache = typer.Typer(help="The kernels that were built: list, show, verify, prune or clear them.")

Name = Annotated[str, typer.Argument(help="The name of a kernel as `list` prints it, or the start of its key.")]


@contextmanager
def _store(debug: bool) -> Iterator[Store]:
    """The store of this user; what goes wrong with it is one line."""
    with clear_errors(debug):
        try:
            store = Store()
            if store.apart:
                raise TargetError(f"cache: {store.note}")
            if store.note:
                Console(stderr=True, soft_wrap=True).print(Text(f"attncc: cache: {store.note}"))
            yield store
        except (StoreError, OSError) as error:
            raise TargetError(f"cache: {one_line(error)}") from error


@cache.callback(invoke_without_command=True)
def main(context: typer.Context, debug: Debug = False) -> None:
    if context.invoked_subcommand is None:
        show_all(debug)


@cache.command("list")
def show_all(debug: Debug = False) -> None:
    """The kernels in the order of their last use."""
    with _store(debug) as store:
        entries = sorted(store.entries(), key=lambda entry: -entry.used)
        table = Table("last used", "size", "kernel")
        for entry in entries:
            table.add_row(_when(entry.used), f"{entry.size / 1024:.0f} KiB", Text(entry.path.name))
        console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
        if entries:
            console.print(table)
        total = sum(entry.size for entry in entries) / 2**20
        records = store.records()
        summary = f"{_kernels(len(entries))}, {total:.1f} MiB, and {records} records, in {store.root}"
        console.print(Text(summary), soft_wrap=True)


@cache.command()
def show(
    name: Name,
    source: Annotated[bool, typer.Option("--source", help="Print the source of the kernel alone.")] = False,
    debug: Debug = False,
) -> None:
    """What is known of one kernel, or its source."""
    with _store(debug) as store:
        entry = _entry(store, name)
        if source:
            text = (entry.path / "kernel.cpp").read_text(encoding="utf-8")
            print_source(Console(soft_wrap=True), text, "cpp")
            return
        wrong = store.verify(entry)
        state = "every file is what was built" if wrong is None else wrong
        lines = {"kernel": entry.name, "key": entry.key, "folder": str(entry.path), "last used": _when(entry.used),
                 "files": ", ".join(sorted(p.name for p in entry.path.iterdir())), "state": state}  # fmt: skip
        for what, text in lines.items():
            print(f"{what:<10} {text}")


@cache.command()
def verify(debug: Debug = False) -> None:
    """Hold every kernel against its checksums and the seal of its store; code 1 if one is not what was built."""
    with _store(debug) as store:
        entries = store.entries()
        wrong = [(entry, why) for entry in entries if (why := store.verify(entry)) is not None]
        for entry, why in wrong:
            print(f"{entry.path.name}: {why}")
        print(f"{_kernels(len(entries))}, {len(wrong)} not in order; they are not used, and `attncc cache prune` "
              "removes them" if wrong else f"{_kernels(len(entries))}, all in order")  # fmt: skip
        if wrong:
            raise typer.Exit(1)


@cache.command()
def prune(
    limit: Annotated[int | None, typer.Option("--limit", min=0, help="MiB to keep at most; 2048 by default.")] = None,
    debug: Debug = False,
) -> None:
    """Remove kernels that are not in order, those used longest ago beyond the limit, old records and leftovers."""
    with _store(debug) as store:
        wrong = [entry for entry in store.entries() if store.verify(entry) is not None]
        for entry in wrong:
            store.discard(entry.path)
        if limit is not None:
            store.pruning.limit = limit << 20
        print(f"removed {_kernels(len(wrong) + store.prune())} from {store.root}")


@cache.command()
def clear(debug: Debug = False) -> None:
    """Remove every kernel, every measurement and every check."""
    with _store(debug) as store:
        print(f"removed {_kernels(store.clear())} from {store.root}")


def _entry(store: Store, name: str) -> Entry:
    every = store.entries()
    found = [x for x in every if name in (x.path.name, x.name) or (len(name) > 3 and x.key.startswith(name))]
    if len(found) != 1:
        known = f"{len(found)} kernels are called" if found else "there is no kernel"
        raise TargetError(f"cache: {known} {name}; `attncc cache list` shows all")
    return found[0]


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).isoformat(sep=" ", timespec="minutes")


def _kernels(count: int) -> str:
    return f"{count} kernel" if count == 1 else f"{count} kernels"
