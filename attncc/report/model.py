"""What became of each attention: the answer of `attncc.explain` and the table that `attncc inspect` prints."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from io import StringIO
from typing import Any, Literal

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

Status = Literal["fused", "kept", "refused"]

#: Where there is no terminal to ask. Narrower ones fold the cells.
WIDTH = 160
COLOURS: dict[Status, str] = {"fused": "green", "kept": "yellow", "refused": "red"}


@dataclass(frozen=True)
class Site:
    """One attention, or one place that looked like one.

    `fused` runs an attncc kernel, `kept` was understood but left to SDPA or the original graph, `refused` was not
    understood. `shapes` maps operand names to dimensions, symbols as text. `visible`, `visited` and `total` count
    scores of the whole site: those the mask lets through, those the kernel computes, and all. `speedup` is the time of
    the best alternative over the time of the kernel, as measured on this machine. Where `trains`, gradients are needed,
    and both times are of forward and backward together; `backward` is what computes them, `backward_kernel` its source
    where it is a kernel. `ir` is the text of the site's attention, `program` that of
    all that takes its place in the graph. `sizes` are the values that the sizes of `ir` had when the graph was
    captured. `code` names the kind of the reason (`attncc.ir.reasons`), with those of the reasons in it: a key to group
    by, where `reason` is the sentence.
    """

    index: int
    status: Status
    reason: str = ""
    path: str = ""
    where: str = ""
    equation: str = ""
    mask: str = ""
    shapes: dict[str, tuple[int | str, ...]] = field(default_factory=dict)
    visible: int | None = None
    visited: int | None = None
    total: int | None = None
    became: str = ""
    speedup: float | None = None
    trains: bool = False
    ir: str | None = None
    program: str | None = None
    kernel: str | None = None
    language: str | None = None
    picture: str | None = None
    sizes: tuple[int, ...] | None = None
    code: str = ""
    backward: str = ""
    backward_kernel: str | None = None

    def __post_init__(self) -> None:
        if self.status not in COLOURS:
            raise ValueError(f"site {self.index}: status is one of {', '.join(COLOURS)}, not {self.status!r}")
        if self.status != "fused" and not self.reason:
            raise ValueError(f"site {self.index} ({self.path}) is {self.status} without a reason")

    def to_dict(self) -> dict[str, Any]:
        """Plain values only; shapes as lists."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        sizes = None if self.sizes is None else list(self.sizes)
        return values | {"shapes": {name: list(shape) for name, shape in self.shapes.items()}, "sizes": sizes}


@dataclass(frozen=True)
class Report:
    """All sites of a model, its graph before and after, and what the user should know (`notes`). `stages` are the
    programs of the sites after each pass, as (name of the pass, text), in the order in which they were made."""

    sites: tuple[Site, ...] = ()
    graph_before: str = ""
    graph_after: str = ""
    notes: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    stages: tuple[tuple[str, str], ...] = ()

    @property
    def fused(self) -> int:
        return self._count("fused")

    @property
    def kept(self) -> int:
        return self._count("kept")

    @property
    def refused(self) -> int:
        return self._count("refused")

    def _count(self, status: Status) -> int:
        return sum(site.status == status for site in self.sites)

    @property
    def kernels(self) -> tuple[str, ...]:
        """The distinct kernel sources, in the order of the sites."""
        return tuple(dict.fromkeys(site.kernel for site in self.sites if site.kernel is not None))

    @property
    def summary(self) -> str:
        if not self.sites:
            return "no attention found"
        plural = "" if len(self.sites) == 1 else "s"
        return f"{len(self.sites)} site{plural}: {self.fused} fused, {self.kept} kept, {self.refused} refused"

    def to_dict(self) -> dict[str, Any]:
        return {
            "sites": [site.to_dict() for site in self.sites],
            "fused": self.fused, "kept": self.kept, "refused": self.refused,
            "graph_before": self.graph_before, "graph_after": self.graph_after,
            "notes": list(self.notes), "versions": dict(self.versions),
        }  # fmt: skip

    def table(self, *, every: bool = False) -> RenderableType:
        """Sites that differ in their place only share a row, unless `every`."""
        if not self.sites:
            return Group(Text(self.summary), *self._notes())
        table = Table(show_lines=True)
        for heading, limit in (("site", None), ("module and source", None), ("attention", 56), ("result", 48)):
            table.add_column(heading, overflow="fold", max_width=limit)
        for sites in [(site,) for site in self.sites] if every else alike(self.sites):
            table.add_row(*_row(sites))
        return Group(table, Text(self.summary, style="bold"), *self._notes())

    def _notes(self) -> Iterator[Text]:
        for note in self.notes:
            yield Text(f"note: {note}", style="yellow")

    def __rich__(self) -> RenderableType:
        return self.table()

    def __str__(self) -> str:
        stream = StringIO()
        Console(file=stream, width=WIDTH, color_system=None, force_terminal=False).print(self.table())
        return stream.getvalue().rstrip("\n")


def alike(sites: Sequence[Site]) -> list[tuple[Site, ...]]:
    """Sites that a reader cannot tell apart but for the numbers in their path, in order of first appearance.

    These are one block repeated over layers. The measured gain may differ inside a group.
    """
    groups: dict[str, list[Site]] = {}
    for site in sites:
        path = re.sub(r"\d+", "#", site.path)
        key = replace(site, index=0, path=path, speedup=None, ir=None, kernel=None, picture=None, sizes=None,
                      backward_kernel=None)  # fmt: skip
        groups.setdefault(repr(key), []).append(site)
    return [tuple(group) for group in groups.values()]


def ranges(numbers: Sequence[int]) -> str:
    """`[0, 1, 2, 5]` -> `0-2,5`."""
    runs: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def merged_path(paths: Sequence[str]) -> str:
    """`["layers.0.attn", "layers.1.attn"]` -> `layers.{0-1}.attn`; paths have equal text around their numbers."""
    split = [re.split(r"(\d+)", path) for path in paths]
    parts: list[str] = []
    for column in zip(*split, strict=True):
        same = len(set(column)) == 1
        parts.append(column[0] if same else "{" + ranges([int(n) for n in column]) + "}")
    return "".join(parts)


def _row(sites: Sequence[Site]) -> tuple[Text, Text, Text, Text]:
    """Cells are Text, never markup: equations and paths hold brackets."""
    site = sites[0]
    names: dict[tuple[int | str, ...], list[str]] = {}
    for name, shape in site.shapes.items():
        names.setdefault(tuple(shape), []).append(name)
    shapes = "  ".join(f"{', '.join(same)} {_shape(shape)}" for shape, same in names.items())
    lines = [site.equation, f"mask: {site.mask}" if site.mask else "", shapes]
    return (
        Text(ranges([s.index for s in sites])),
        Text(merged_path([s.path for s in sites]) or "(top level)") + Text(f"\n{site.where}", style="dim"),
        Text("\n".join(line for line in lines if line)),
        _result(sites),
    )


def _shape(shape: Sequence[int | str]) -> str:
    return "(" + ", ".join(str(n) for n in shape) + ")"


def _result(sites: Sequence[Site]) -> Text:
    site = sites[0]
    text = Text(site.status, style=COLOURS[site.status])
    if site.became:
        text.append(f": {site.became}", style="default")
    if site.backward:
        text.append(f"\nbackward: {site.backward}", style="default")
    gains = sorted(s.speedup for s in sites if s.speedup is not None)
    if gains and not site.reason:  # a reason says what was measured
        low, high = f"{gains[0]:.2f}", f"{gains[-1]:.2f}"
        gain = low if low == high else f"{low} to {high}"
        what = "forward and backward " if site.trains else ""
        text.append(f"\n{what}{gain} times as fast as the best alternative", style="default")
    if site.status == "fused" and site.visited is not None and site.total and site.visited < site.total:
        text.append(f"\ncomputes {site.visited / site.total:.0%} of the scores", style="default")
        if site.visible is not None:
            text.append(f", {site.visible / site.total:.0%} visible", style="default")
            most = site.total / max(site.visible, 1)
            text.append(f"\nat most {most:.3g} times as fast by leaving scores out", style="default")
    if site.reason:
        text.append(f"\n{site.reason}", style="default")
    return text
