"""Measuring candidates against each other, and remembering which one won where.

Candidates take turns, so that what disturbs the machine disturbs all of them, and what is compared is the median of
their ratios within a turn. The result is kept in the store under all that it depends on: the attention, the bucket of
its shape, threads, device, versions. How far the ratios of the two best lay apart is kept with it: what was decided
within that noise is doubtful. `ATTNCC_REMEASURE=doubtful` in the environment decides such situations anew, once in a
process, and `ATTNCC_REMEASURE=all` every one.
"""

from __future__ import annotations

import os
import platform
import re
import secrets
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch

from attncc.runtime.forks import Guard
from attncc.runtime.recent import Recent
from attncc.runtime.store import Store, key

#: Candidates whose times differ by less than this are equally fast: it is what repeated runs of one kernel differ by.
TIE = 0.03
#: One sample takes at least this long, by calling more than once where a call is shorter.
SAMPLE_S = 100e-6
LEAST_ROUNDS, MOST_ROUNDS = 3, 51
#: After a few rounds, what is this many times slower than the best is no longer run.
HOPELESS = 2.0
#: Seconds after which one round is enough: long calls differ less from each other.
PATIENCE_S = 4.0

#: The environment's word for what is measured anew: `all`, or `doubtful` decisions.
REMEASURE = "ATTNCC_REMEASURE"

Call = Callable[[], object]
#: (call, repeats) -> seconds of one call
Sampler = Callable[[Call, int], float]

_measuring = Guard(again=True)


@dataclass(frozen=True)
class Timings:
    """Microseconds of a call by candidate, fastest first; how many rounds were run; and what raised, with the message.

    The numbers are the median of one candidate, times each candidate's median ratio to it."""

    us: Mapping[str, float]
    rounds: int
    failed: Mapping[str, str]
    #: How far the middle half of the ratios, within a turn, of the two fastest lies apart. None where one ran, or once.
    noise: float | None = None

    @property
    def winner(self) -> str:
        """The fastest. Raises ValueError if every candidate failed."""
        if not self.us:
            raise ValueError(f"no candidate ran: {'; '.join(f'{n}: {why}' for n, why in self.failed.items())}")
        return next(iter(self.us))


@dataclass(frozen=True)
class Decision:
    """Which candidate runs, why, the timings behind it (microseconds), and their noise, as a ratio."""

    winner: str
    reason: str
    us: Mapping[str, float]
    noise: float | None = None

    @property
    def doubtful(self) -> bool:
        """Whether the noise reaches as far as to where the other candidate would have won, or is not known."""
        if len(self.us) < 2:
            return False
        best, second = sorted(self.us.values())[:2]
        return self.noise is None or abs(second / best - 1 - TIE) < self.noise


def on_cpu(call: Call, repeats: int) -> float:
    """Where one thread computes, its own time: what other programs take of a loaded machine is nobody's slowness."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats


def on_cuda(call: Call, repeats: int) -> float:
    """By events of the current stream, so that the host's own time counts only where the device waits for it."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def sampler_for(device: torch.device) -> Sampler:
    return on_cuda if device.type == "cuda" else on_cpu


def compare(candidates: Mapping[str, Call], budget_s: float, sample: Sampler = on_cpu) -> Timings:
    """Time the candidates for about `budget_s` seconds, warm-up excluded.

    Each is called to warm up (what that raises removes it), then all take turns, at least three times, or once where
    that takes seconds. One measurement at a time in a process; a candidate may measure something of its own while it
    warms up."""
    failed: dict[str, str] = {}
    samples: dict[str, list[float]] = {}
    with _measuring():
        repeats: dict[str, int] = {}
        for name, call in candidates.items():
            try:
                once = sample(call, 1)
                if once < PATIENCE_S / 8:
                    once = sample(call, 1)
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {error}"
                continue
            repeats[name] = max(1, min(1000, round(SAMPLE_S / max(once, 1e-9))))
            samples[name] = []
        rounds, spent = 0, 0.0
        running = list(samples)
        while running and rounds < MOST_ROUNDS and (_too_few(rounds, spent) or spent < budget_s):
            for name in running:
                taken = sample(candidates[name], repeats[name])
                samples[name].append(taken)
                spent += taken * repeats[name]
            running = [*running[1:], running[0]]  # no one always runs after the same other
            rounds += 1
            if rounds >= LEAST_ROUNDS:
                times = _relative({n: samples[n] for n in running})
                running = [n for n in running if times[n] <= HOPELESS * min(times.values())]
                if len(running) == 1:
                    break
    us = {n: t * 1e6 for n, t in _relative(samples).items()}
    fastest = dict(sorted(us.items(), key=lambda x: x[1]))
    return Timings(fastest, rounds, failed, _noise(*[samples[n] for n in list(fastest)[:2]]))


def _noise(*two: Sequence[float]) -> float | None:
    if len(two) < 2 or min(map(len, two)) < 2:
        return None
    low, _, high = statistics.quantiles((x / max(y, 1e-12) for x, y in zip(*two, strict=False)), n=4)
    return high - low


def _too_few(rounds: int, spent: float) -> bool:
    return rounds < (LEAST_ROUNDS if spent < PATIENCE_S else 1)


def _relative(samples: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Times that compare well: a machine that slows down half-way splits every candidate's samples in two heaps, and
    plain medians then fall into either."""
    if not samples:
        return {}
    longest = max(len(s) for s in samples.values())
    one = next(s for s in samples.values() if len(s) == longest)
    scale = statistics.median(one)
    # samples of one round stand at one place; a candidate that was dropped has only the first rounds
    return {
        n: scale * statistics.median(x / max(y, 1e-12) for x, y in zip(s, one, strict=False))
        for n, s in samples.items()
    }


def decide(timings: Timings, ours: Sequence[str]) -> Decision:
    """The fastest candidate of `ours` if nothing else is faster by more than `TIE`; otherwise the fastest of all.

    Raises ValueError if every candidate failed."""
    winner = timings.winner
    mine = next((n for n in timings.us if n in ours), None)
    other = next((n for n in timings.us if n not in ours), None)
    if mine is None:
        why = "; ".join(f"{n}: {timings.failed[n]}" for n in ours if n in timings.failed)
        return Decision(winner, f"no kernel ran ({why or 'none was offered'})", timings.us, timings.noise)
    if other is None:
        return Decision(mine, "nothing to compare with", timings.us, timings.noise)
    own, their = timings.us[mine], timings.us[other]
    shown = f"{mine} {own:.1f} us, {other} {their:.1f} us"
    if own <= their * (1 + TIE):
        return Decision(mine, f"{their / own:.2f} times as fast: {shown}", timings.us, timings.noise)
    return Decision(other, f"the kernel is {own / their:.2f} times slower: {shown}", timings.us, timings.noise)


def bucket(sizes: Sequence[int]) -> tuple[int, ...]:
    """Sizes that share a measurement: each rounded up to 0, 1, 2, 3, 4, 6, 8, 12, 16, 24, ... (two an octave)."""
    return tuple(_rounded_up(n) for n in sizes)


def _rounded_up(n: int) -> int:
    if n <= 2:
        return max(n, 0)
    power = 1 << (n - 1).bit_length()  # the smallest power of two that is >= n
    return power * 3 // 4 if n <= power * 3 // 4 else power


@dataclass(frozen=True)
class Situation:
    """All that a measurement depends on. `candidates` are the digests of what was compared, so that a new kernel is
    measured anew. `gradients` are the tensors whose gradients were computed too."""

    spec: str
    sizes: tuple[int, ...]
    candidates: tuple[str, ...]
    device: str
    threads: int
    precision: str
    torch: str
    gradients: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return key({"kind": "measurement", **asdict(self)})


def situation(
    spec: str, sizes: Sequence[int], device: torch.device, candidates: Sequence[str], gradients: Sequence[str] = ()
) -> Situation:
    """The present situation of a call: `spec` is the attention's text, `sizes` every extent that matters to speed,
    `gradients` the tensors whose gradients are wanted."""
    return Situation(
        spec, bucket(sizes), tuple(sorted(candidates)), *settings(device), str(torch.__version__), tuple(gradients)
    )


def settings(device: torch.device) -> tuple[str, int, str]:
    """What the time of a call depends on beside the call: the make of the device, the threads, and the precision of
    float32 products, which callers change between calls."""
    backends = cast(Any, torch.backends)
    library = backends.cuda if device.type == "cuda" else backends.mkldnn
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    return device_name(device), threads, str(library.matmul.fp32_precision)


def choose(
    store: Store, where: Situation, candidates: Mapping[str, Call], ours: Sequence[str], budget_s: float,
    sample: Sampler = on_cpu,
) -> Decision:  # fmt: skip
    """The remembered decision of this situation, or a new one, measured now and remembered."""
    return remembered(store, where, candidates, lambda: decide(compare(candidates, budget_s, sample), ours))


def remembered(store: Store, where: Situation, names: Collection[str], make: Callable[[], Decision]) -> Decision:
    """The remembered decision of this situation if its winner is one of `names`, or the one that `make` comes to."""
    known = recalled(store, where)
    if known is not None and known.winner in names:
        return known
    decision = make()
    record = {"winner": decision.winner, "reason": decision.reason, "us": dict(decision.us), "noise": decision.noise}
    store.remember(where.key, record)
    _renewed[where.key] = True
    if os.environ.get(REMEASURE):
        store.remember(_GENERATION, {"of": secrets.token_hex(8)})
    return decision


#: The record of what counts the times that a store's choices were made anew.
_GENERATION = key({"kind": "generation of choices"})


def generation(store: Store) -> str:
    """Another text after each process that made choices anew: what was derived from older ones holds no more."""
    return str((store.recall(_GENERATION) or {}).get("of", ""))


#: Situations that this process has measured itself.
_renewed = Recent[str, bool](4096)


def recalled(store: Store, where: Situation) -> Decision | None:
    """What was decided here before, by this process or another, unless the environment asks for it anew."""
    record = store.recall(where.key)
    if record is None or set(record) - {"noise"} != {"winner", "reason", "us"}:
        return None
    us, noise = cast(dict[str, float], record["us"]), cast(float | None, record.get("noise"))
    known = Decision(str(record["winner"]), str(record["reason"]), us, noise)
    asked = os.environ.get(REMEASURE, "")
    if where.key not in _renewed and (asked == "all" or (asked == "doubtful" and known.doubtful)):
        return None
    return known


def device_name(device: torch.device) -> str:
    """The make of a device, as it names itself."""
    unnumbered = str(device) == "cuda"  # the current one, which changes
    return _device_name(torch.device("cuda", torch.cuda.current_device()) if unnumbered else device)


@cache
def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else f"{platform.machine()} {platform.processor()}".strip()
