"""What ran while a recording was on: the attentions of compiled graphs, and what their kernels visited.

    with attncc.record() as report:
        model(**inputs)
    print(report)

Nothing is compiled anew to be reported on (`attncc.driver.ran`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from attncc.driver.breaks import Breaks
from attncc.driver.collected import Collected, collecting
from attncc.driver.guarding import guards, outside_calls
from attncc.driver.machine import machine, versions
from attncc.driver.ran import Ran, recordings
from attncc.report.model import Guard, Report
from attncc.report.site import Site


class Recording:
    """What was found since a recording began, as a report that grows: everything of `attncc.report.model.Report`, at
    the time of asking."""

    def __init__(self) -> None:
        self.collected = Collected()
        self._graphs: dict[int, tuple[Ran, list[Site]]] = {}

    @property
    def report(self) -> Report:
        """What was found until now."""
        return report(replace(self.collected, sites=[s for _, sites in self._graphs.values() for s in sites]))

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.report.sites

    @property
    def notes(self) -> tuple[str, ...]:
        return self.report.notes

    @property
    def guard(self) -> tuple[Guard, ...]:
        return self.report.guard

    @property
    def outside(self) -> int:
        return self.report.outside

    def to_dict(self) -> dict[str, Any]:
        return self.report.to_dict()

    def html(self, title: str = "a model") -> str:
        return self.report.html(title)

    def _repr_html_(self) -> str | None:
        return self.report._repr_html_()

    def __rich__(self) -> Any:
        return self.report.table()

    def __repr__(self) -> str:
        return repr(self.report)

    def __str__(self) -> str:
        return str(self.report)

    def sites_of(self, graph: Ran) -> list[Site]:
        """The records of a graph's sites, to be completed. A graph is known by what ran it first."""
        known = self._graphs.get(id(graph))
        if known is None:
            known = self._graphs[id(graph)] = graph, list(graph.found.sites)
            if not graph.collected:
                self.note("what was compiled before the recording is shown without its graph and its passes")
            self.collected.notes += [n for n in graph.found.notes if n not in self.collected.notes]
            self.collected.planned |= graph.found.planned
        return known[1]

    def note(self, note: str) -> None:
        """Say something else that the user should know, once."""
        if note not in self.collected.notes:
            self.collected.notes.append(note)


@contextmanager
def record() -> Iterator[Recording]:
    """Report on the attentions of every compiled graph that this thread compiles or calls meanwhile.

    Nothing is compiled anew, and what is compiled stays. The first call of a graph in a recording counts what its
    kernels visit and draws the masks, which takes time: do not measure in a recording. Graph breaks become notes."""
    taken = Recording()
    before = Breaks()
    tokens = recordings.set((*recordings.get(), taken)), collecting.set(taken.collected)
    try:
        yield taken
    finally:
        collecting.reset(tokens[1])
        recordings.reset(tokens[0])
        for note in before.notes():
            taken.note(note)


def artifact_of(found: Collected) -> str:
    """The JSON of a report on a compilation, without the sources of its kernels and the texts of its graph."""
    whole = report(found).to_dict()
    return json.dumps({name: x for name, x in whole.items() if name not in ("kernels", "graph_before", "graph_after")})


def report(found: Collected) -> Report:
    """A report on what compilations found."""
    seen, outside = (guards(), outside_calls()) if found.planned else ((), 0)
    said = [str(g) for g in seen]
    said += [f"{outside} calls had lengths that their plan does not hold for, and ran exact"] if outside else []
    return Report(
        sites=tuple(replace(site, index=n) for n, site in enumerate(found.sites)),
        graph_before="\n\n".join(found.before),
        graph_after="\n\n".join(found.after),
        notes=tuple(dict.fromkeys([*found.notes, *said])),
        versions=versions(),
        machine=machine(),
        guard=seen,
        outside=outside,
    )
