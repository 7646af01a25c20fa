"""A report in a terminal: for each site, or for sites that are alike, a block that reads at 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from attncc.report import words
from attncc.report.site import Site, Status, alike, merged_path, ranges

#: Columns where there is no terminal to ask.
WIDTH = 80
COLOURS: dict[Status, str] = {"fused": "green", "kept": "yellow", "refused": "red"}
#: Characters and lines of a mask beside its site.
_WIDE, _HIGH = 22, 9


def table(sites: Sequence[Site], summary: str, notes: Sequence[str], *, every: bool = False) -> RenderableType:
    """Sites that differ in their place only share a block, unless `every`."""
    blocks = [(site,) for site in sites] if every else alike(sites)
    parts: list[RenderableType] = []
    for group in blocks:
        parts += _block(group)
    if sites:
        parts.append(Rule(style="dim"))
    parts.append(Text(summary, style="bold"))
    parts += [Text(f"note: {note}", style="yellow") for note in notes]
    return Group(*parts)


def _block(sites: Sequence[Site]) -> Iterator[RenderableType]:
    """Cells are Text, never markup: equations and paths hold brackets."""
    site = sites[0]
    plural = "" if len(sites) == 1 else "s"
    title = Text.assemble(
        f"site{plural} {ranges([s.index for s in sites])}: ", (site.status, f"bold {COLOURS[site.status]}")
    )
    yield Rule(title, align="left", style="dim")
    yield Text(merged_path([s.path for s in sites]) or "(top level)", style="bold")
    if site.where:
        yield Text(site.where, style="dim")
    rows = Table.grid(padding=(0, 1))
    rows.add_column(style="dim", no_wrap=True, min_width=9)
    rows.add_column(overflow="fold")
    for name, text in facts(sites):
        rows.add_row(Text(name), Text(text))
    # where only data tells what is visible, and no call showed it, the picture would claim that all of it is
    picture = None if site.visible is None else small_picture(site.picture)
    if picture is None:
        yield rows
        return
    beside = Table.grid(padding=(0, 2), expand=True)
    beside.add_column(ratio=1)
    beside.add_column(no_wrap=True)
    beside.add_row(rows, picture)
    yield beside


def facts(sites: Sequence[Site]) -> list[tuple[str, str]]:
    """What is known of sites that are alike, as names and texts; what is not known is left out."""
    site = sites[0]
    found = [
        ("attention", site.equation), ("mask", site.mask), ("shapes", words.shapes(site)),
        ("scores", words.scores(site)), ("runs", site.became), ("backward", site.backward),
        ("measured", words.measured(sites)),
        ("plan", words.plan(sites)), ("why", words.why(site)),
    ]  # fmt: skip
    return [(name, text) for name, text in found if text]


def small_picture(picture: str | None) -> Text | None:
    """A mask at the size that fits beside a site: every so many characters of it."""
    lines = [] if picture is None else picture.splitlines()
    if not lines:
        return None
    step = max(1, -(-len(lines) // _HIGH), -(-len(lines[0]) // _WIDE))
    return Text("\n".join(line[::step] for line in lines[::step]))
