"""One attention of a model, or one place that looked like one, as a report has it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

Status = Literal["fused", "kept", "refused"]
#: Fields of a site that pages show and the JSON leaves out.
PAGE_ONLY = ("stages", "cells", "graph", "fused_graph")
STATUSES: tuple[Status, ...] = ("fused", "kept", "refused")


@dataclass(frozen=True)
class HeadForm:
    """What a plan has some heads of an attention do: the form (`exact` where none), the numbers of the heads, the share
    of the visible keys that it keeps, and the divergence that the heads add by it, as predicted."""

    form: str
    heads: tuple[int, ...]
    density: float
    error: float


@dataclass(frozen=True)
class GraphNode:
    """A node of a model's graph in a drawing: its name, what it does (nothing for an input), the places of its inputs
    in the drawing, and whether it is `given` to the site, the site's `own`, its output (`site`) or a `user` of that."""

    name: str
    operation: str
    inputs: tuple[int, ...]
    role: str


@dataclass(frozen=True, repr=False)
class Site:
    """One attention, or one place that looked like one.

    `fused` runs an attncc kernel, `kept` was understood but left to SDPA or the original graph, `refused` was not
    understood. `shapes` maps operand names to dimensions, symbols as text. `visible`, `visited` and `total` count
    scores of the whole site: those the mask lets through, those the kernel computes, and all. `timings` are
    microseconds of a call of each candidate that was measured; `speedup` is the time of the best alternative over the
    time of the kernel. Where `trains`, gradients are needed, and both times are of forward and backward together;
    `forward_us` is the forward's share of the kernel's, `backward` what computes the gradients, `backward_kernel` its
    source where it is a kernel. `ir` is the text of the
    site's attention, `program` that of all that takes its place in the graph, `stages` the same after lifting and
    after each pass, by name. Equation and mask have the names of the model's graph; `names` gives them for those in
    `ir`. `sizes` are the values that the sizes of `ir` had when the graph was captured. `code` names the kind of
    the reason (`attncc.ir.reasons`), with those of the reasons in it: a key to group by, where `reason` is the
    sentence. `isa` is the instruction set that the kernel uses, or the capability of the GPU. `forms`: what heads
    do under a plan; `head` is that whose mask is shown, the first with a form of its own. `cells` are the mask of the
    first sequence and that head in a call, uint8[rows, keys], by the classes of
    `attncc.passes.bounds.mask_cells`; None where `ir` and `sizes` say all that there is to it. `graph` is the part
    of the model's graph that the site stands in, `fused_graph` the same with the kernel in it.
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
    forward_us: float | None = None
    names: dict[str, str] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    isa: str = ""
    forms: tuple[HeadForm, ...] = ()
    head: int = 0
    stages: tuple[tuple[str, str], ...] = ()
    graph: tuple[GraphNode, ...] = ()
    fused_graph: tuple[GraphNode, ...] = ()
    cells: torch.Tensor | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"site {self.index}: status is one of {', '.join(STATUSES)}, not {self.status!r}")
        if self.status != "fused" and not self.reason:
            raise ValueError(f"site {self.index} ({self.path}) is {self.status} without a reason")

    def __repr__(self) -> str:
        """In one line: the texts of IR and kernel are a hundred thousand characters."""
        what = f": {self.equation}" if self.equation else f": {self.code or self.reason}"
        return f"<site {self.index}, {self.status}, {self.path or '(top level)'}{what}>"

    def sources(self) -> dict[str, str | None]:
        """The sources of its kernels, by the names of the fields."""
        return {"kernel": self.kernel, "backward_kernel": self.backward_kernel}

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, as in the JSON of a report (docs/report.md) but for the kernels, which are sources."""
        names = [f for f in self.__dataclass_fields__ if f not in PAGE_ONLY]
        values = {name: getattr(self, name) for name in names}
        return values | {
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "sizes": None if self.sizes is None else list(self.sizes),
            "names": dict(self.names), "timings": dict(self.timings),
            "forms": [asdict(form) | {"heads": list(form.heads)} for form in self.forms],
        }  # fmt: skip


def alike(sites: Sequence[Site]) -> list[tuple[Site, ...]]:
    """Sites that a reader cannot tell apart but for the numbers in their path, in order of first appearance.

    These are one block repeated over layers. What was measured may differ inside a group, and under a plan the errors
    of its forms, which the reason names as well."""
    groups: dict[tuple[object, ...], list[Site]] = {}
    for site in sites:
        key = (
            site.status, "" if site.forms else site.reason, re.sub(r"\d+", "#", site.path), site.where,
            site.equation, site.mask,
            tuple(site.shapes.items()), site.visible, site.visited, site.total, site.became, site.trains,
            site.language, site.code, site.backward,
            tuple((f.form, f.heads, f"{f.density:.0%}") for f in site.forms),
        )  # fmt: skip
        groups.setdefault(key, []).append(site)
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
