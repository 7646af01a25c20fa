"""What became of each attention: the answer of `attncc.explain`, `attncc.record` and `attncc inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from io import StringIO
from typing import Any

from rich.console import Console, RenderableType

from attncc.report import page
from attncc.report.site import Site, Status
from attncc.report.table import WIDTH, table

#: The version of the JSON of a report (docs/report.md).
SCHEMA = "attncc-report/1"


@dataclass(frozen=True)
class Guard:
    """What the guard of a plan's site saw in this process: of its `calls`, `trips` were off the exact result by more
    than `bound` on the rows that were looked at, relative, and ran exact; `worst` is the largest that was seen."""

    site: str
    calls: int
    trips: int
    worst: float
    bound: float

    def __str__(self) -> str:
        return (
            f"guard of {self.site}: {self.trips} of {self.calls} calls off by more than {self.bound:.2g} ran exact "
            f"(worst {self.worst:.2g})"
        )


@dataclass(frozen=True, repr=False)
class Report:
    """All sites of a model, the text of its graphs before and after, and what the user should know (`notes`).
    `machine` says what the times were measured on: processor, threads, instruction set, precision of float32 products,
    and the GPU where one was used. `guard` is what the guards of plans saw so far in this process, `outside` how many
    calls of graphs ran exact as their plan does not hold for their lengths."""

    sites: tuple[Site, ...] = ()
    graph_before: str = ""
    graph_after: str = ""
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    guard: tuple[Guard, ...] = ()
    outside: int = 0

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
        """The distinct kernel sources, forward and backward, in the order of the sites."""
        each = (x for site in self.sites for x in (site.kernel, site.backward_kernel))
        return tuple(dict.fromkeys(x for x in each if x is not None))

    @property
    def stages(self) -> tuple[tuple[str, str], ...]:
        """The programs of the sites after lifting and after each pass, as (name, text), those of equal sites once."""
        distinct = dict.fromkeys(site.stages for site in self.sites)
        return tuple(stage for stages in distinct for stage in stages)

    @property
    def summary(self) -> str:
        if not self.sites:
            return "no attention found"
        plural = "" if len(self.sites) == 1 else "s"
        return f"{len(self.sites)} site{plural}: {self.fused} fused, {self.kept} kept, {self.refused} refused"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as docs/report.md describes them: what `attncc inspect --json` prints."""
        keys = {source: sha256(source.encode()).hexdigest()[:16] for source in self.kernels}
        sites = [
            site.to_dict() | {n: keys.get(x or "") for n, x in site.sources().items()} for site in self.sites
        ]
        return {
            "schema": SCHEMA, "versions": dict(self.versions), "machine": dict(self.machine),
            "fused": self.fused, "kept": self.kept, "refused": self.refused, "notes": list(self.notes),
            "guard": [asdict(g) for g in self.guard], "outside": self.outside,
            "sites": sites, "kernels": {key: source for source, key in keys.items()},
            "graph_before": self.graph_before, "graph_after": self.graph_after,
        }  # fmt: skip

    def table(self, *, every: bool = False) -> RenderableType:
        """For a terminal. Sites that differ in their place only share a block, unless `every`."""
        return table(self.sites, self.summary, self.notes, every=every)

    def __rich__(self) -> RenderableType:
        return self.table()

    def html(self, title: str = "a model") -> str:
        """One page for a browser, complete in itself. Raises PageError where jinja2 is not installed."""
        return page.page(self, title)

    def _repr_html_(self) -> str | None:
        return page.in_notebook(self)

    def __repr__(self) -> str:
        return f"<attncc report, {self.summary}>"

    def __str__(self) -> str:
        return self.text()

    def text(self, *, every: bool = False) -> str:
        """The table as text of 80 columns, no line with spaces at its end."""
        stream = StringIO()
        Console(file=stream, width=WIDTH, color_system=None, force_terminal=False).print(self.table(every=every))
        return "\n".join(line.rstrip() for line in stream.getvalue().rstrip("\n").splitlines())

