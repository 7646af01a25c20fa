"""Never slower in training: a kernel takes a site that learns only if its forward and backward together beat those of
the model's own form, and need no more memory.

The backward measured is the one that runs. Cheapest first: a step that is faster than the matrix products of the
unfused form has won; one that is slower than the model's own operations one by one has lost; only what is left is
compiled by Inductor, with its backward, to be compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import fx

from attncc import torch_private
from attncc.codegen import torch_form
from attncc.driver.baseline import Trial
from attncc.driver.candidate import Candidate, Choice, settled
from attncc.driver.floors import products, score_bytes
from attncc.ir.interpret import extent, size_table
from attncc.kernels.build import default_store
from attncc.patterns.softmax.anchors import SDPA
from attncc.progress import step
from attncc.runtime.measure import TIE, Call, Decision, Timings, compare, remembered, sampler_for, situation
from attncc.runtime.memory import peak_bytes

BUDGET_S = 0.15
#: Peak memory beyond that of the model's own form that a step may need: a tenth of it, or the scratch of one site,
#: which is given back before the next layer takes as much.
MORE_MEMORY, SCRATCH_BYTES = 1.1, 16 << 20

OURS = "attncc"
#: The name under which the time of the kernel's forward alone stands beside those of whole steps.
FORWARD = "attncc, forward"


def decide_steps(parts: Sequence[Candidate], data: Trial, spec: str, shape: list[int], *, recomputed: bool) -> Choice:
    """Measure whole steps of sites that are fused together or not at all; `shape` is every extent that matters."""
    device = data.known[parts[0].site.tensors[0]].device
    rival = "SDPA" if parts[0].site.node.target is SDPA else "unfused"
    region = "" if data.autocast is None else f" under autocast to {data.autocast[1]}"
    again = ", forward run again in backward" if recomputed else ""
    where = situation(
        spec, shape, device, (*(p.made.source for p in parts), _backward(), rival + region + again),
        [f"{at}.{name}" for at, p in enumerate(parts) for name in p.learned],
    )  # fmt: skip
    step(f"measuring {parts[0].made.name}, forward and backward")

    def measured() -> Decision:
        return _with_forward(parts, data, device, _measured(parts, data, rival, device, recomputed))

    decision = remembered(default_store(), where, (OURS, rival), measured)
    other = next((us for name, us in decision.us.items() if name not in (OURS, FORWARD)), None)
    own = decision.us.get(OURS)
    ratio = other / own if own and other else None
    return settled(decision.winner == OURS, ratio, decision)


@cache
def _backward() -> str:
    """What tells one version of the backward from another."""
    home = Path(torch_form.__file__).parent
    patterns = ("torch_*.py", "cpp/*.py", "cpp/lib/*.h", "triton/*.py")
    files = [f for pattern in patterns for f in sorted(home.glob(pattern))]
    return sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


def _with_forward(parts: Sequence[Candidate], data: Trial, device: torch.device, decision: Decision) -> Decision:
    """The same with the time of the kernel's forward alone, where the kernel won: what is left is its backward's."""
    if decision.winner != OURS or OURS not in decision.us:
        return decision

    def forward() -> object:
        with torch.enable_grad():
            return _fused(parts, data)

    timed = compare({FORWARD: forward}, BUDGET_S / 6, sampler_for(device))
    return replace(decision, us={**decision.us, **timed.us})


def _measured(
    parts: Sequence[Candidate], data: Trial, rival: str, device: torch.device, recomputed: bool
) -> Decision:  # fmt: skip
    sample = sampler_for(device)
    ours = whole_step(lambda: _fused(parts, data), leaves_of(data.known.values()), nullcontext, recomputed)
    floor = _floor(parts, data, recomputed) if rival == "unfused" else None
    if floor is not None:
        timed = compare({OURS: ours, "products": floor}, BUDGET_S / 3, sample)
        fast = not timed.failed and timed.us[OURS] <= timed.us["products"] * (1 + TIE)
        most = score_bytes(parts[0], data.sizes[0])
        if fast and _within(peak_bytes(ours, device), most):
            reason = "forward and backward are faster than their matrix products alone"
            return Decision(OURS, reason, {OURS: timed.us[OURS]})
    own = whole_step(data.run, leaves_of(data.inputs), nullcontext, recomputed)
    timed = compare({OURS: ours, rival: own}, BUDGET_S, sample)
    lost = _settled(timed, rival)
    if lost.winner != OURS:
        return lost
    if not _by_torchs_kernel(data):
        step("compiling the unfused form with its backward for comparison")
        try:
            with data.around():
                compiled = torch_private.inductor_apart_with_backward(data.module, data.inputs)
            own = whole_step(lambda: compiled(*data.inputs), leaves_of(data.inputs), data.around, recomputed)
            timed = compare({OURS: ours, rival: own}, BUDGET_S, sample)
        except Exception as error:  # whatever it is, the model's own operations would meet it too
            return Decision(OURS, f"not measured: Inductor fails on the model's own form ({last_line(error)})", {})
        lost = _settled(timed, rival)
        if lost.winner != OURS:
            return lost
    return _lean(lost, peak_bytes(ours, device), peak_bytes(own, device), rival)


def last_line(error: Exception) -> str:
    """The last line of an error's message, or its type."""
    return str(error).strip().splitlines()[-1].strip() if str(error).strip() else type(error).__name__


def _settled(timed: Timings, rival: str) -> Decision:
    """What times alone decide: in training a tie gains nothing, and the site stays as it is."""
    own, their = timed.us.get(OURS), timed.us.get(rival)
    if own is None:
        return Decision(rival, f"in training no kernel ran ({timed.failed[OURS]})", timed.us)
    if their is None:
        return Decision(rival, f"in training not measured: its own form fails ({timed.failed[rival]})", timed.us)
    shown = f"{OURS} {own:.1f} us, {rival} {their:.1f} us"
    if own > their * (1 - TIE):
        ratio = f"{own / their:.2f} of the time of the model's own"
        return Decision(rival, f"in training its forward and backward took {ratio}: {shown}", timed.us, timed.noise)
    return Decision(OURS, f"forward and backward {their / own:.2f} times as fast: {shown}", timed.us, timed.noise)


def _lean(won: Decision, own: int | None, their: int | None, rival: str) -> Decision:
    """The same, if its peak of memory is no reason against it."""
    if own is None or their is None or _within(own, their):
        return won
    shown = f"{own / 2**20:.0f} MiB at the peak, the model's own {their / 2**20:.0f} MiB"
    return Decision(rival, f"in training its forward and backward would take {shown}", won.us, won.noise)


def _within(own: int | None, their: int) -> bool:
    return own is None or own <= max(their * MORE_MEMORY, their + SCRATCH_BYTES)


def _floor(parts: Sequence[Candidate], data: Trial, recomputed: bool) -> Call | None:
    """The products of a single site, None where they say nothing of it."""
    (p, *more), sizes = parts, data.sizes[0]
    if more or data.made or p.site.summed:
        return None
    return products(p.final, data.tensors()[0], sizes, p.learned, recomputed=recomputed)


def _by_torchs_kernel(data: Trial) -> bool:
    """Whether the model's own form is one of torch's fused attentions, which Inductor calls as they are."""
    with torch.enable_grad():
        made = data.run()[0].grad_fn
    return made is not None and made.name().startswith("ScaledDotProduct")


def _fused(parts: Sequence[Candidate], data: Trial) -> list[torch.Tensor]:
    """What the fused graph computes: the operator of each site, and what joins their outputs."""
    joined: dict[fx.Node, torch.Tensor] = {}
    sums: list[torch.Tensor] = []
    for p, tensors, sizes in zip(parts, data.tensors(), data.sizes, strict=True):
        outputs = torch.ops.attncc.attention(tensors, sizes, p.spec)
        out = outputs[p.final.outputs.index("out")]
        if p.site.summed:
            table = size_table(p.site.attention, sizes)
            out = out.reshape([extent(x.extent, table) for x in p.site.attention.out_axes]).sum(p.site.summed)
        node = p.site.node
        joined[node] = out if node not in joined else joined[node].add(out.view_as(joined[node]))
        if p.site.lse is not None or p.site.piece is not None:
            sums.append(outputs[p.final.outputs.index("lse")])
    return [*joined.values(), *sums]


def whole_step(
    forward: Callable[[], Sequence[torch.Tensor]], leaves: Sequence[torch.Tensor],
    around: Callable[[], AbstractContextManager[object]], recomputed: bool,
) -> Call:  # fmt: skip
    """A call that runs forward and backward, with the same gradients of the outputs each time."""
    seeds: list[torch.Tensor] = []

    def run() -> object:
        with torch.enable_grad(), around():
            if recomputed:
                with torch.no_grad():
                    forward()
            outputs = [x for x in forward() if x.requires_grad]
        if not seeds:
            seeds.extend(torch.randn(x.shape, device=x.device).to(x.dtype) for x in outputs)
        return torch.autograd.grad(outputs, leaves, seeds, allow_unused=True)

    return run


def leaves_of(tensors: Any) -> list[torch.Tensor]:
    """Those of some values that require gradients, each once."""
    found = {id(x): x for x in tensors if isinstance(x, torch.Tensor) and x.requires_grad}
    return list(found.values())
