"""Never slower: a kernel takes a site only if it beats what the site would be without attncc.

Measured on made-up data of the site's shapes, once for each attention, shape bucket and machine; the store remembers.
Slower by at most 3% counts as no slower: two runs of one kernel differ by as much (`attncc.runtime.measure.TIE`). A
kernel that is as fast as the site's two matrix products alone cannot lose, and then nothing else is compiled to be
compared with. Where gradients are wanted, backward is measured with it (`attncc.driver.training_selection`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from attncc import torch_private
from attncc.driver.baseline import Trial, Untimeable, autocast_at, hint, looks, trial
from attncc.driver.candidate import Candidate, Choice, settled, unmeasured
from attncc.driver.floors import products, too_large
from attncc.driver.training import Training
from attncc.driver.training_selection import decide_steps, last_line
from attncc.ir.interpret import extent, size_table
from attncc.ir.reasons import because
from attncc.kernels.build import default_store
from attncc.patterns.graph.facts import Facts
from attncc.patterns.softmax.anchors import SDPA
from attncc.progress import step
from attncc.runtime.measure import (
    TIE,
    Decision,
    Situation,
    choose,
    compare,
    recalled,
    remembered,
    sampler_for,
    situation,
)
from attncc.runtime.outputs import signature_of
from attncc.runtime.recent import Recent

BUDGET_S = 0.15


def decide(parts: Sequence[Candidate], facts: Facts, training: Training) -> Choice:
    """Measure the kernels of sites that are fused together or not at all against the sites' own operations."""
    spec = "\n".join(p.spec for p in parts)
    trains = any(p.learned for p in parts)
    try:
        large = too_large(parts, [[hint(x, facts) for x in p.site.sizes] for p in parts])
        if large and trains and parts[0].site.node.target is SDPA:
            return Choice(False, None, because("training-not-measured", large))
        if large:
            return Choice(True, None, because("not-measured", large))
        same = (spec, *(x for p in parts for x in (str(p.site.node.target), p.learned, *looks(p.site, facts))),
                trains and training.recomputed, autocast_at(parts[0].site.node, facts))  # fmt: skip
        if same not in _decided:
            data = trial([p.site for p in parts], facts, training.nodes if trains else ())
            _decided[same] = _measure(parts, spec, data, training.recomputed)
    except Untimeable as error:
        return unmeasured(trains, str(error))
    return _decided[same]


#: Equal sites of a process are decided alike: layers must not differ by the noise of a measurement.
_decided = Recent[tuple[object, ...], Choice](1024)


def _measure(parts: Sequence[Candidate], spec: str, data: Trial, recomputed: bool) -> Choice:
    tensors = [t for each in data.tensors() for t in each]
    shape = [int(n) for t in tensors for n in t.shape] + [n for each in data.sizes for n in each]
    if any(p.learned for p in parts):
        return decide_steps(parts, data, spec, shape, recomputed=recomputed)
    device = tensors[0].device
    first = parts[0]
    ours = _fused(parts, data)
    region = () if data.autocast is None else (f"autocast to {data.autocast[1]}",)

    def measured(names: tuple[str, ...]) -> Any:
        return situation(spec, shape, device, (*(p.made.source for p in parts), *names, *region))

    step(f"measuring {first.made.name}")
    with torch.no_grad():
        if first.site.node.target is SDPA:
            return _settle(measured(("sdpa",)), {"attncc": ours, "SDPA": data.run}, device)
        where = measured(("unfused",))
        known = recalled(default_store(), where)
        if known is not None and known.winner in ("attncc", "unfused"):  # nothing need be compiled to know
            return _choice(known)
        if len(parts) == 1 and not data.made and not first.site.summed:
            two = products(first.final, data.tensors()[0], data.sizes[0])
            beside = _beside_products(measured(("products",)), {"attncc": ours, "products": two}, device)
            if beside.winner == "attncc":
                return Choice(True, None, because("cannot-lose"), beside.us)
        step("compiling the unfused form for comparison")
        try:
            with data.around():
                unfused = torch_private.inductor_apart(data.module, data.inputs)
        except Exception as error:  # whatever it is, the model's own operations would meet it too
            why = f"Inductor fails on the model's own form ({last_line(error)})"
            return Choice(True, None, because("not-measured", why))
        return _settle(where, {"attncc": ours, "unfused": lambda: unfused(*data.inputs)}, device)


def _beside_products(
    where: Situation, candidates: dict[str, Callable[[], object]], device: torch.device
) -> Decision:  # fmt: skip
    """Won by a kernel that is as fast as the site's two products alone. Remembered, as every measurement: a later
    process must neither wait for it nor come to another choice."""

    def found() -> Decision:
        timings = compare(candidates, BUDGET_S / 3, sampler_for(device))
        us = timings.us
        won = not timings.failed and us["attncc"] <= us["products"] * (1 + TIE)
        return Decision("attncc" if won else "products", "beside the two products alone", us, timings.noise)

    return remembered(default_store(), where, candidates, found)


def _settle(where: Any, candidates: dict[str, Callable[[], object]], device: torch.device) -> Choice:
    return _choice(choose(default_store(), where, candidates, ("attncc",), BUDGET_S, sampler_for(device)))


def _choice(decision: Decision) -> Choice:
    other = next((us for name, us in decision.us.items() if name != "attncc"), None)
    own = decision.us.get("attncc")
    ratio = other / own if own and other else None
    return settled(decision.winner == "attncc", ratio, decision)


def _fused(parts: Sequence[Candidate], data: Trial) -> Callable[[], object]:
    """What the fused graph does: the kernels, and what joins their outputs."""
    outputs = [
        signature_of(p.spec).allocate(tensors, sizes)
        for p, tensors, sizes in zip(parts, data.tensors(), data.sizes, strict=True)
    ]
    still = data.tensors() if data.still else None

    def run() -> None:
        joined: dict[fx.Node, torch.Tensor] = {}
        given = data.tensors() if still is None else still
        for p, tensors, sizes, outs in zip(parts, given, data.sizes, outputs, strict=True):
            p.made.kernel(tensors, sizes, outs)
            out = outs[0]
            if p.site.summed:
                table = size_table(p.site.attention, sizes)
                out = out.reshape([extent(x.extent, table) for x in p.site.attention.out_axes]).sum(p.site.summed)
            node = p.site.node
            joined[node] = out if node not in joined else joined[node].add(out.view_as(joined[node]))

    return run
