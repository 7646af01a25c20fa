"""What compilations found, for whoever collects it."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field, replace

from attncc.report.site import Site


@dataclass
class Collected:
    """The sites of some compilations in order, the text of their graphs before and after, what the user should know,
    what each pass did, and whether any of it was under a plan. `caches`: the numbers of the inputs of its graph that
    have boxes beside them."""

    sites: list[Site] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    planned: bool = False
    caches: set[int] = field(default_factory=set)

    def add(self, other: Collected) -> None:
        """What another compilation found, after what there is."""
        first = len(self.sites)
        self.sites += [replace(site, index=first + at) for at, site in enumerate(other.sites)]
        self.before += other.before
        self.after += other.after
        self.notes += other.notes
        self.planned |= other.planned


collecting: ContextVar[Collected | None] = ContextVar("attncc_collecting", default=None)
