"""`attncc plan`: what a plan says, how two differ, and whether one fits a model."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from attncc.cli.output import WIDTH, Debug, clear_errors, print_report, quiet
from attncc.frontends.targets import TargetError, load
from attncc.report.site import merged_path, ranges

if TYPE_CHECKING:
    from attncc.plans.plan import Plan, SitePlan

plan = typer.Typer(help="Plans: show one, compare two, or check one against a model.", no_args_is_help=True)

File = Annotated[Path, typer.Argument(metavar="FILE", help="A file that `attncc profile` wrote.")]


@plan.command()
def show(file: File, debug: Debug = False) -> None:
    """Print what a plan says of each attention, its budget and its certificate."""
    with clear_errors(debug):
        print_plan(_load(file))


@plan.command()
def diff(one: File, other: File, debug: Debug = False) -> None:
    """Print how two plans differ; the exit status is 1 where they do."""
    with clear_errors(debug):
        found = list(differences(_load(one), _load(other)))
        for line in found:
            print(line)
        if found:
            raise typer.Exit(1)


@plan.command()
def check(
    file: File,
    target: Annotated[str | None, typer.Argument(help="`module:factory` of the model that should follow it.")] = None,
    debug: Debug = False,
) -> None:
    """Check a file, and with a target whether its model can follow the plan: exit status 0, or 2 with the reason."""
    with clear_errors(debug):
        known = _load(file)
        if target is None:
            print(f"{file}: a plan of {len(known.sites)} attentions, {'' if known.certified else 'not '}certified")
            return
        from attncc.cli.inspect import examine  # noqa: PLC0415 loads the driver

        with quiet(debug):
            report = examine(load(target), plan=file)
        print_report(report)
        followed = sum("planned" in site.code.split() for site in report.sites)
        wanted = sum(s.sparse for s in known.sites)
        print(f"{followed} attentions follow the plan, which has forms for {wanted}")
        if wanted and not followed:
            raise TargetError(f"{file}: no attention of {target} follows the plan")


def _load(file: Path) -> Plan:
    from attncc.plans.plan import load as read  # noqa: PLC0415 msgspec is loaded where there is a plan

    return read(file)


def print_plan(known: Plan) -> None:
    """A row for the sites of equal rules, then what holds for all."""
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    table = Table(show_lines=True)
    for heading, limit in (("attention", None), ("heads", None), ("form", 48), ("keys kept", None), ("error", None),
                           ("ms, exact", None), ("ms", None)):  # fmt: skip
        table.add_column(heading, overflow="fold", max_width=limit)
    for sites in alike(known.sites):
        first = sites[0]
        rest = sorted({*range(first.heads)} - {h for r in first.rules for h in r.heads})
        heads = [ranges(r.heads) for r in first.rules] + ([ranges(rest)] if rest else [])
        forms = [r.form for r in first.rules] + (["exact"] if rest else [])
        kept = [f"{r.density:.0%}" for r in first.rules] + (["100%"] if rest else [])
        table.add_row(
            Text(f"{merged_path([s.path for s in sites]) or '(top level)'} ({first.phase})"), "\n".join(heads),
            Text("\n".join(forms)), "\n".join(kept), f"{sum(s.error for s in sites):.1e}",
            f"{sum(s.exact_ms for s in sites):.1f}", f"{sum(s.ms for s in sites):.1f}",
        )  # fmt: skip
    console.print(table)
    for line in known.summary():
        console.print(Text(line))


def alike(sites: Iterable[SitePlan]) -> list[list[SitePlan]]:
    """Sites whose heads take the same forms, and whose paths differ in their numbers alone."""
    groups: dict[object, list[SitePlan]] = {}
    for site in sites:
        rules = tuple((r.form, r.heads) for r in site.rules)
        groups.setdefault((re.sub(r"\d+", "#", site.path), site.place, site.phase, site.what, rules), []).append(site)
    return list(groups.values())


def differences(one: Plan, other: Plan) -> Iterable[str]:
    """How two plans differ, a line each."""
    for name in ("budget", "lengths", "certificate"):
        a, b = getattr(one, name), getattr(other, name)
        if a != b:
            yield f"{name}: {a}  |  {b}"
    if {*one.weights} != {*other.weights}:
        yield "weights: they are plans of different models"
    tables = [{s.key: s for s in p.sites} for p in (one, other)]
    for key in dict.fromkeys((*tables[0], *tables[1])):
        a, b = (t.get(key) for t in tables)
        where = f"{key[0] or '(top level)'} ({key[2]})"
        if a is None or b is None:
            yield f"{where}: only in the {'second' if a is None else 'first'}"
        elif _forms(a) != _forms(b):
            yield f"{where}: {_forms(a)}  |  {_forms(b)}"


def _forms(site: SitePlan) -> str:
    return ", ".join(f"{r.form} on {ranges(r.heads)}" for r in site.rules) or "exact"
