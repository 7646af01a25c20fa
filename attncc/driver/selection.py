"""Never slower: a kernel takes a site only if it beats what the site would be without attncc.

Measured on made-up data of the site's shapes, once for each attention, shape bucket and machine; the store remembers.
A kernel that is faster than the site's two matrix products alone cannot lose, and then nothing else is compiled to be
compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attncc import torch_private
from attncc.driver.baseline import Trial, Untimeable, hint, looks, trial
from attncc.ir import Attention
from attncc.ir.attention import Axis
from attncc.ir.interpret import extent, size_table
from attncc.kernels.build import Built, default_store
from attncc.patterns.graph.facts import Facts
from attncc.patterns.site.assemble import Lifted
from attncc.patterns.softmax.anchors import SDPA
from attncc.progress import step
from attncc.runtime.measure import TIE, choose, compare, sampler_for, situation
from attncc.runtime.outputs import plan_of
from attncc.runtime.recent import Recent

BUDGET_S = 0.15
#: Scores that would fill more than this are not computed just to be timed.
_MOST_SCORE_BYTES = 1 << 30


@dataclass(frozen=True)
class Choice:
    """Whether the kernel takes the site, by what ratio of times it beats the alternative (if known), and why."""

    fused: bool
    speedup: float | None
    reason: str


@dataclass(frozen=True)
class Candidate:
    """A site with the attention that its kernel runs, the text of that, and the kernel."""

    site: Lifted
    final: Attention
    spec: str
    made: Built


def decide(parts: Sequence[Candidate], facts: Facts) -> Choice:
    """Measure the kernels of sites that are fused together or not at all against the sites' own operations."""
    spec = "\n".join(p.spec for p in parts)
    try:
        too_large = _too_large(parts, [[hint(x, facts) for x in p.site.sizes] for p in parts])
        if too_large:
            return Choice(True, None, f"not measured: {too_large}")
        same = (spec, *(x for p in parts for x in (str(p.site.node.target), *looks(p.site, facts))))
        if same not in _decided:
            data = trial([p.site for p in parts], facts)
            _decided[same] = _measure(parts, spec, data, [t for each in data.tensors() for t in each])
    except Untimeable as error:
        return Choice(True, None, f"not measured: {error}")
    return _decided[same]


#: Equal sites of a process are decided alike: layers must not differ by the noise of a measurement.
_decided = Recent[tuple[object, ...], Choice](1024)


def _measure(parts: Sequence[Candidate], spec: str, data: Trial, tensors: list[torch.Tensor]) -> Choice:
    device = tensors[0].device
    first = parts[0]
    ours = _fused(parts, data)

    def measured(names: tuple[str, ...]) -> Any:
        shape = [int(n) for t in tensors for n in t.shape] + [n for each in data.sizes for n in each]
        return situation(spec, shape, device, (*(p.made.source for p in parts), *names))

    step(f"measuring {first.made.name}")
    with torch.no_grad():
        if first.site.node.target is SDPA:
            return _settle(measured(("sdpa",)), {"attncc": ours, "SDPA": _eager(data)}, device)
        if len(parts) == 1 and not data.made and not first.site.summed:
            products = _products(first.final, data.tensors()[0], data.sizes[0])
            floor = compare({"attncc": ours, "products": products}, BUDGET_S / 3, sampler_for(device))
            if not floor.failed and floor.us["attncc"] <= floor.us["products"] * (1 + TIE):
                return Choice(True, None, "faster than its two matrix products alone")
        step("compiling the unfused form for comparison")
        try:
            unfused = torch_private.inductor_apart(data.module, data.inputs)
        except Exception as error:  # whatever it is, the model's own operations would meet it too
            return Choice(True, None, f"not measured: Inductor fails on the model's own form ({_last_line(error)})")
        return _settle(measured(("unfused",)), {"attncc": ours, "unfused": lambda: unfused(*data.inputs)}, device)


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip() if str(error).strip() else type(error).__name__


def _settle(where: Any, candidates: dict[str, Callable[[], object]], device: torch.device) -> Choice:
    decision = choose(default_store(), where, candidates, ("attncc",), BUDGET_S, sampler_for(device))
    other = next((us for name, us in decision.us.items() if name != "attncc"), None)
    own = decision.us.get("attncc")
    ratio = other / own if own and other else None
    return Choice(decision.winner == "attncc", ratio, decision.reason)


def _fused(parts: Sequence[Candidate], data: Trial) -> Callable[[], object]:
    """What the fused graph does: the kernels, and what joins their outputs."""
    outputs = [
        plan_of(p.spec).allocate(tensors, sizes)
        for p, tensors, sizes in zip(parts, data.tensors(), data.sizes, strict=True)
    ]
    still = data.tensors()

    def run() -> None:
        joined: dict[fx.Node, torch.Tensor] = {}
        given = data.tensors() if data.made else still
        for p, tensors, sizes, outs in zip(parts, given, data.sizes, outputs, strict=True):
            p.made.kernel(tensors, sizes, outs)
            out = outs[0]
            if p.site.summed:
                table = size_table(p.site.attention, sizes)
                out = out.reshape([extent(x.extent, table) for x in p.site.attention.out_axes]).sum(p.site.summed)
            node = p.site.node
            joined[node] = out if node not in joined else joined[node].add(out.view_as(joined[node]))

    return run


def _eager(data: Trial) -> Callable[[], object]:
    return lambda: data.module(*data.inputs)


def _score_bytes(p: Candidate, sizes: list[int]) -> int:
    a = p.site.attention
    table = size_table(a, sizes)
    count = 4
    for at, axis in enumerate((*a.batch, a.i, a.j)):
        count *= 1 if at in p.site.summed else extent(axis.extent, table)
    return count


def _too_large(parts: Sequence[Candidate], sizes: Sequence[list[int]]) -> str:
    """Why the unfused form is not even set up, or nothing: what takes minutes and gigabytes is no rival."""
    if parts[0].site.node.target is SDPA:
        too_large = _mask_bytes(parts[0], sizes[0]) >= _MOST_SCORE_BYTES
        return "the mask that SDPA takes would fill a gigabyte" if too_large else ""
    total = sum(_score_bytes(p, each) for p, each in zip(parts, sizes, strict=True))
    return "its scores alone would fill over a gigabyte" if total > _MOST_SCORE_BYTES else ""


def _mask_bytes(p: Candidate, sizes: list[int]) -> int:
    """What SDPA makes of the mask it is given, in floats, for one head."""
    node, a = p.site.node, p.site.attention
    given = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    table = size_table(a, sizes)
    return 0 if given is None else 4 * extent(a.i.extent, table) * extent(a.j.extent, table)


def _products(a: Attention, tensors: list[torch.Tensor], sizes: list[int]) -> Callable[[], object]:
    """The two matrix products of an attention alone: a lower bound of every unfused form."""
    table = size_table(a, sizes)

    def dense(name: str, row: Axis, column: Axis) -> torch.Tensor:
        source = tensors[[t.name for t in a.tensors].index(name)]
        count = 1
        for axis in a.batch:
            count *= extent(axis.extent, table)
        shape = (count, extent(row.extent, table), extent(column.extent, table))
        return torch.randn(shape, device=source.device).to(source.dtype)

    q, k, v = dense(a.q.tensor, a.i, a.d), dense(a.k.tensor, a.j, a.d), dense(a.v.tensor, a.j, a.e)
    weights = torch.bmm(q, k.transpose(1, 2))

    def run() -> None:
        torch.bmm(q, k.transpose(1, 2))
        torch.bmm(weights, v)

    return run
