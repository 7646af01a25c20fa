"""A report as one page for a browser: complete in itself, with no network, and readable by keyboard and screen reader.

What comes from a model (names, paths, notes) is escaped by jinja2, and the page's own policy lets no other script run
than the one that it came with, by its digest."""

from __future__ import annotations

import html
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from importlib import import_module
from typing import Any, Protocol

import torch

from attncc.passes.bounds.mask_cells import PARTIAL, SKIPPED, VISIBLE, WASTED
from attncc.report import words
from attncc.report.drawing import drawing
from attncc.report.mask_image import PALETTE, cells_of, png
from attncc.report.site import Site, alike, merged_path, ranges
from attncc.report.table import facts

#: Characters of kernels that a page holds; the sources of the others are left out.
MOST_SOURCE = 1_000_000
#: Pixels of a mask's longer side at first, and of the bar of the slowest candidate.
_MASK, _BAR = 512, 240


class Reported(Protocol):
    """What a page shows of a report (`attncc.report.model.Report`)."""

    @property
    def sites(self) -> tuple[Site, ...]: ...
    @property
    def notes(self) -> tuple[str, ...]: ...
    @property
    def versions(self) -> Mapping[str, str]: ...
    @property
    def machine(self) -> Mapping[str, Any]: ...
    @property
    def kernels(self) -> tuple[str, ...]: ...
    @property
    def summary(self) -> str: ...


class PageError(RuntimeError):
    """No page can be made here. The message is one line that says what is missing."""


@dataclass
class Module:
    """A module of the model that holds attention, with the sites right in it and the modules below."""

    name: str
    sites: list[dict[str, Any]] = field(default_factory=list)
    below: list[Module] = field(default_factory=list)

    def inner(self, name: str) -> Module:
        found = next((m for m in self.below if m.name == name), None)
        if found is None:
            found = Module(name)
            self.below.append(found)
        return found


def page(report: Reported, title: str = "a model") -> str:
    """The page of a report, HTML of one file. Raises PageError where jinja2 is not installed."""
    try:
        jinja2: Any = import_module("jinja2")
    except ImportError as error:
        raise PageError("a page is made by jinja2, which is not installed: pip install 'attncc[report]'") from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("attncc.report", "templates"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    style, script = (environment.loader.get_source(environment, name)[0] for name in ("style.css", "script.js"))
    numbers = {source: n for n, source in enumerate(report.kernels, 1)}
    groups = alike(report.sites)
    of_site = {site.index: n for n, group in enumerate(groups, 1) for site in group}
    own: Any = import_module("markupsafe").Markup  # what comes with the page, and from no model
    machine = [(name.replace("_", " "), x) for name, x in (*report.machine.items(), *report.versions.items())]
    return environment.get_template("page.html").render(
        report=report, title=title, groups=[_group(g, numbers) for g in groups], tree=_tree(report.sites, of_site),
        kernels=_kernels(report), machine=machine,
        style=own(style), script=own(script), script_digest=b64encode(sha256(script.encode()).digest()).decode(),
    )  # fmt: skip


def in_notebook(report: Reported, title: str = "a model") -> str | None:
    """The page in a frame of its own, for notebooks; None where none can be made, so that they show the text."""
    try:
        whole = page(report, title)
    except PageError:
        return None
    return (
        '<iframe title="attention by attncc" sandbox="allow-scripts" style="width: 100%; height: 40rem; border: 0"'
        f' srcdoc="{html.escape(whole)}"></iframe>'
    )


def _kernels(report: Reported) -> list[dict[str, Any]]:
    """The distinct kernels, as long as there is room for their sources."""
    left, found = MOST_SOURCE, []
    for source in report.kernels:
        site = next(s for s in report.sites if source in s.sources().values())
        left -= len(source)
        found.append({
            "language": {"cpp": "C++", "triton": "Triton"}.get(site.language or "", "plain torch"),
            "lines": source.count("\n") + 1, "number": site.index, "source": source if left >= 0 else None,
        })  # fmt: skip
    return found


def _tree(sites: Iterable[Site], groups: dict[int, int]) -> list[Module]:
    root = Module("")
    for site in sites:
        at = root
        for name in (site.path or "(top level)").split("."):
            at = at.inner(name)
        at.sites.append({"index": site.index, "status": site.status, "group": groups[site.index]})
    return root.below


def _group(sites: Sequence[Site], kernels: dict[str, int]) -> dict[str, Any]:
    """What a page shows of sites that are alike."""
    site = sites[0]
    known = site.total is not None and site.status == "fused" and site.visited is not None
    slowest = max(site.timings.values(), default=1.0)
    chosen = "attncc" if site.status == "fused" else min(site.timings, key=site.timings.__getitem__, default="")
    return {
        "site": site, "count": len(sites), "numbers": ranges([s.index for s in sites]),
        "path": merged_path([s.path for s in sites]) or "(top level)",
        "facts": [(name, text) for name, text in facts(sites) if name != "plan"],
        "computed": words.share(site.visited or 0, site.total or 1) if known else "",
        "speedup": "" if site.speedup is None else f"{site.speedup:.2f}",
        "timings": [
            {"name": name, "text": words.duration(us), "width": round(_BAR * us / slowest), "chosen": name == chosen}
            for name, us in sorted(site.timings.items(), key=lambda x: x[1])
        ],
        "forms": [
            {
                "form": f.form, "heads": ranges(f.heads), "density": f"{f.density:.0%}",
                "error": words.error_of(sites, n),
            }
            for n, f in enumerate(site.forms)
        ],
        "mask": _mask(site),
        "drawings": [
            (f"Graph {when}", drawn)
            for when, nodes in (("before", site.graph), ("after", site.fused_graph))
            if (drawn := drawing(nodes)) is not None
        ],
        "stages": _stages(site), "kernel": kernels.get(site.kernel or ""),
        "backward_kernel": kernels.get(site.backward_kernel or ""),
    }  # fmt: skip


def _stages(site: Site) -> list[dict[str, str]]:
    """The program after each pass; no text where a pass left it as it was."""
    found: list[dict[str, str]] = []
    last = ""
    for name, text in site.stages:
        found.append({"name": name, "text": "" if text == last else text})
        last = text
    return found


def _whose(site: Site) -> str:
    """Whose mask is shown."""
    form = next((f.form for f in site.forms if site.head in f.heads), "exact")
    return "the first batch point" if form == "exact" else f"the first sequence and head {site.head}: {form}"


def _mask(site: Site) -> dict[str, Any] | None:
    if site.picture is None or site.ir is None or site.visible is None:
        return None
    cells = cells_of(site)
    rows, keys = cells.shape
    scale = _MASK / max(rows, keys)
    names = {VISIBLE: "visible", PARTIAL: "visible in part", WASTED: "computed in vain", SKIPPED: "skipped"}
    shares = {kind: words.share(int((cells == kind).sum()), cells.numel()) for kind in names}
    legend = [(name, "rgb({}, {}, {})".format(*PALETTE[kind]), shares[kind]) for kind, name in names.items()]
    text = ", ".join(f"{share} {name}" for name, _, share in legend)
    return {
        "data": b64encode(png(cells.to(torch.uint8))).decode(),
        "width": max(1, round(keys * scale)), "height": max(1, round(rows * scale)),
        "legend": legend, "text": f"Mask of {rows} by {keys} cells: {text}.",
        "caption": f"{rows} by {keys} cells, of {_whose(site)}. Keys + and - zoom, 0 fits.",
    }  # fmt: skip
