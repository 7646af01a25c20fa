"""Compiled graphs as Dynamo calls them: a call does nothing but look whether anybody records, or profiles, in this
thread. Who does is told what ran, and nothing is compiled anew for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, Protocol

import torch

from attncc import torch_private
from attncc.driver.collected import Collected
from attncc.errors import unforeseen
from attncc.report.site import Site
from attncc.runtime.kept import run_beside
from attncc.runtime.watching import watched


class Recorder(Protocol):
    """Who records what graphs run."""

    def sites_of(self, graph: Ran) -> list[Site]: ...


#: The recordings that are on in this thread, the innermost last.
recordings: ContextVar[tuple[Recorder, ...]] = ContextVar("attncc_recordings", default=())


class Ran:
    """A compiled graph that holds sites, called by Dynamo. `collected`: it was compiled in a recording."""

    def __init__(self, run: Callable[..., Any], found: Collected, collected: bool) -> None:
        self.run, self.found, self.collected = run, found, collected
        self.outside = any("policy-other-length" in site.code for site in found.sites)
        for taken in recordings.get():
            taken.sites_of(self)

    def __call__(self, *args: Any) -> Any:
        taken = recordings.get()
        if self.outside:
            from attncc.driver.guarding import count_outside  # noqa: PLC0415 - for plans alone

            count_outside()
        if self.found.caches:
            return run_beside([args[n] for n in self.found.caches], lambda: self._ran(taken, args))
        return self._ran(taken, args)

    def _ran(self, taken: Sequence[Recorder], args: Sequence[Any]) -> Any:
        if not taken and not torch_private.profiling():
            return self.run(*args)
        calls = _Calls(self, [x.sites_of(self) for x in taken])
        with watched(calls):
            return self.run(*args)


class _Calls:
    """The calls of attncc's operator in one call of a graph: of equal attentions, in the order of the sites."""

    def __init__(self, graph: Ran, records: Sequence[list[Site]]) -> None:
        self.records = records
        self.left: dict[str, list[int]] = {}
        for n, site in enumerate(graph.found.sites):
            if site.status == "fused":
                self.left.setdefault(site.ir or "", []).append(n)
        self.sites = graph.found.sites

    def __call__(self, tensors: Sequence[torch.Tensor], sizes: Sequence[int], spec: str) -> Any:
        waiting = self.left.get(spec)
        if not waiting:
            return nullcontext()
        n = waiting.pop(0)
        for sites in self.records:
            if sites[n].visible is None:
                sites[n] = _counted(sites[n], tensors, sizes, spec)
        if not torch_private.profiling():
            return nullcontext()
        return torch.profiler.record_function(f"attncc: {self.sites[n].path or 'attention'}")


def _counted(site: Site, tensors: Sequence[torch.Tensor], sizes: Sequence[int], spec: str) -> Site:
    """The record of a site with what its kernel visits in a call."""
    from attncc.kernels.visited import visited  # noqa: PLC0415 - for recordings alone

    try:
        with torch.no_grad():
            found = visited(spec, tensors, [int(x) for x in sizes], drawn=True, head=site.head)
    except Exception as error:  # a report that says less is no reason for a model not to run
        unforeseen("counting what a kernel visits", error)
        return site
    area = found.area
    return replace(
        site, visible=area.visible, visited=area.visited, total=area.total, picture=found.picture, cells=found.cells,
        sizes=tuple(int(x) for x in sizes),
    )
