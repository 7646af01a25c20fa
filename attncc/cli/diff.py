"""`attncc diff`: what changed between two reports, of two versions of a model or of attncc."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from attncc.cli.output import Debug, clear_errors
from attncc.frontends.targets import TargetError, one_line
from attncc.report.compare import Change, Json, SchemaError, changes, reports_of
from attncc.report.site import merged_path


def diff(
    before: Annotated[Path, typer.Argument(help="What `attncc inspect --json` printed.", metavar="A.json")],
    after: Annotated[Path, typer.Argument(help="The same, later.", metavar="B.json")],
    debug: Debug = False,
) -> None:
    """Show what changed between two reports. The exit code is 0 where nothing did, 1 where something did."""
    with clear_errors(debug):
        old, new = read(before), read(after)
        if old.keys() != new.keys():
            raise TargetError(f"{before} and {after}: one holds training as well, the other does not")
    console = Console(soft_wrap=True, highlight=False)
    with clear_errors(debug):
        try:
            found = {name: changes(old[name], new[name]) for name in old}
        except (TypeError, AttributeError, KeyError, ArithmeticError) as error:
            raise TargetError(f"{before} and {after}: one holds what no report holds ({one_line(error)})") from error
    for name, each in found.items():
        if name and each:
            console.print(Text(f"{name}:", style="bold"))
        show(console, each)
    if any(found.values()):
        raise typer.Exit(1)
    console.print(Text("no difference"))


def show(console: Console, found: list[Change]) -> None:
    """Changes by what they belong to, those of layers that changed alike once. Where something is gone or new, there is
    one side of the arrow only."""
    places: dict[tuple[tuple[str, str, str], ...], list[str]] = {}
    for where in dict.fromkeys(change.where for change in found):
        same = tuple((x.what, x.before, x.after) for x in found if x.where == where)
        places.setdefault((*same, ("", re.sub(r"\d+", "#", where), "")), []).append(where)
    for (*lines, _), wheres in places.items():
        console.print(Text(merged_path(wheres), style="bold"))
        for what, before, after in lines:
            old = Text(before, style="red") if before else Text("none", style="dim")
            new = Text(after, style="green") if after else Text("none", style="dim")
            console.print(Text.assemble(f"  {what}: ", old, " -> ", new))


def read(path: Path) -> dict[str, Json]:
    """The reports in a file. Raises TargetError."""
    try:
        return reports_of(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise TargetError(f"{path}: no such file") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TargetError(f"{path}: is not JSON as `attncc inspect TARGET --json` writes it") from error
    except (OSError, RecursionError) as error:
        raise TargetError(f"{path}: {one_line(error)}") from error
    except SchemaError as error:
        raise TargetError(f"{path}: {error}; write it with `attncc inspect TARGET --json > FILE`") from error
