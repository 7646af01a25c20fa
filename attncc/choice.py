"""Never slower: a kernel takes a site only if it beats what the site would be without attncc.

Measured on made-up data of the site's shapes, once for each attention, shape bucket and machine; the store remembers.
A kernel that is faster than the site's two matrix products alone cannot lose, and then nothing else is compiled to be
compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from attncc import torch_private
from attncc.alternative import Trial, Untimeable, trial
from attncc.ir import Attention, print_attention
from attncc.ir.attention import Axis
from attncc.ir.interpret import extent, size_table
from attncc.kernels import Built, default_store
from attncc.patterns.anchors import SDPA
from attncc.patterns.assemble import Lifted
from attncc.patterns.facts import Facts
from attncc.progress import step
from attncc.runtime.measure import TIE, choose, compare, sampler_for, situation
from attncc.runtime.outputs import plan_of

BUDGET_S = 0.15
#: Scores that would fill more than this are not computed just to be timed.
_MOST_SCORE_BYTES = 1 << 30


@dataclass(frozen=True)
class Choice:
    """Whether the kernel takes the site, by what ratio of times it beats the alternative (if known), and why."""

    fused: bool
    speedup: float | None
    reason: str


def decide(site: Lifted, final: Attention, made: Built, facts: Facts) -> Choice:
    """Measure the kernel of a site against the site's own operations. `final` is the attention that the kernel runs."""
    try:
        data = trial(site, facts)
    except Untimeable as error:
        return Choice(True, None, f"not measured: {error}")
    spec = print_attention(final)
    same = (spec, str(site.node.target), tuple((tuple(t.shape), t.stride()) for t in data.tensors), *data.sizes)
    if same not in _decided:
        _decided[same] = _measure(site, final, made, spec, data)
    return _decided[same]


#: Equal sites of a process are decided alike: layers must not differ by the noise of a measurement.
_decided: dict[tuple[object, ...], Choice] = {}


def _measure(site: Lifted, final: Attention, made: Built, spec: str, data: Trial) -> Choice:
    device = data.tensors[0].device
    outputs = plan_of(spec).allocate(data.tensors, data.sizes)

    def ours() -> None:
        made.kernel(data.tensors, data.sizes, outputs)

    def measured(names: tuple[str, ...]) -> Any:
        shape = [int(n) for t in data.tensors for n in t.shape] + data.sizes
        return situation(spec, shape, device, (made.source, *names))

    step(f"measuring {made.name}")
    with torch.no_grad():
        if site.node.target is SDPA:
            return _settle(data, measured(("sdpa",)), {"attncc": ours, "SDPA": _eager(data)}, device)
        if _score_bytes(final, data) > _MOST_SCORE_BYTES:
            return Choice(True, None, "not measured: its scores alone would fill over a gigabyte")
        products = _products(final, data)
        floor = compare({"attncc": ours, "products": products}, BUDGET_S / 3, sampler_for(device))
        if not floor.failed and floor.us["attncc"] <= floor.us["products"] * (1 + TIE):
            return Choice(True, None, "faster than its two matrix products alone")
        step("compiling the unfused form for comparison")
        try:
            unfused = torch_private.inductor_apart(data.module, data.inputs)
        except Exception as error:  # whatever it is, the model's own operations would meet it too
            return Choice(True, None, f"not measured: Inductor fails on the model's own form ({_last_line(error)})")
        return _settle(data, measured(("unfused",)), {"attncc": ours, "unfused": lambda: unfused(*data.inputs)}, device)


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip() if str(error).strip() else type(error).__name__


def _settle(data: Trial, where: Any, candidates: dict[str, Callable[[], object]], device: torch.device) -> Choice:
    decision = choose(default_store(), where, candidates, ("attncc",), BUDGET_S, sampler_for(device))
    other = next((us for name, us in decision.us.items() if name != "attncc"), None)
    own = decision.us.get("attncc")
    ratio = other / own if own and other else None
    return Choice(decision.winner == "attncc", ratio, decision.reason)


def _eager(data: Trial) -> Callable[[], object]:
    return lambda: data.module(*data.inputs)


def _score_bytes(a: Attention, data: Trial) -> int:
    table = size_table(a, data.sizes)
    count = 4
    for axis in (*a.batch, a.i, a.j):
        count *= extent(axis.extent, table)
    return count


def _products(a: Attention, data: Trial) -> Callable[[], object]:
    """The two matrix products of an attention alone: a lower bound of every unfused form."""
    table = size_table(a, data.sizes)

    def dense(name: str, row: Axis, column: Axis) -> torch.Tensor:
        source = data.tensors[[t.name for t in a.tensors].index(name)]
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
