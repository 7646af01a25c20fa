"""`attncc bench --suite windows`: models with long windows, compiled by attncc, by Inductor and with FlexAttention.

Each model is written as its kind is in the wild: with SDPA and a mask made in the graph. FlexAttention's form of the
same has a block mask, made outside the timed call. Rounds take turns, medians count, results are compared with eager's
(with FlexAttention's where that is skipped). Memory is the most that a call adds to the process. A row takes a bounded
time: a formulation that would take more seconds or bytes than the limits, by what it took at a shorter length or by an
estimate, is skipped, and the row says why.
"""

from __future__ import annotations

import ctypes
import json as json_format
import math
import platform
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from attncc.bench.chosen import chosen
from attncc.runtime.measure import on_cpu

LENGTHS = (4096, 8192, 16384, 32768)
PEERS = ("attncc", "eager", "inductor", "flex")
Mask = Callable[[Tensor, Tensor], Tensor]  # of rows and keys, which broadcast


class Stack(nn.Module):
    """Layers of attention with projections and a residual, each under its mask; scores capped at `cap` where given."""

    def __init__(
        self, masks: Sequence[Callable[..., Tensor]], cap: float | None = None, heads: int = 4, size: int = 64
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.masks, self.cap, self.heads, self.size = masks, cap, heads, size
        self.qkv = nn.ModuleList(nn.Linear(heads * size, 3 * heads * size) for _ in masks)
        self.blocks: list[Any] | None = None  # FlexAttention's masks

    def forward(self, x: Tensor, doc: Tensor) -> Tensor:
        tokens = torch.arange(x.shape[1])
        for n, (mask, layer) in enumerate(zip(self.masks, self.qkv, strict=True)):
            q, k, v = layer(x).unflatten(-1, (3, self.heads, self.size)).permute(2, 0, 3, 1, 4)
            if self.blocks is None:
                seen = mask(tokens[:, None], tokens[None, :], doc)
                out = scaled_dot_product_attention(q, k, v, attn_mask=seen) if self.cap is None else (
                    capped_attention(q, k, v, seen, self.cap))  # fmt: skip
            else:
                out = flex_attention(q, k, v, score_mod=self._score_mod(), block_mask=self.blocks[n])
            x = x + out.transpose(1, 2).flatten(2)
        return x

    def _score_mod(self) -> Callable[..., Tensor] | None:
        cap = self.cap
        return None if cap is None else lambda s, b, h, i, j: torch.tanh(s / cap) * cap

    def flex(self, n: int, doc: Tensor) -> Stack:
        """The same weights, FlexAttention's form."""
        twin = Stack(self.masks, self.cap, self.heads, self.size)
        twin.load_state_dict(self.state_dict())
        makers = [lambda b, h, i, j, mask=mask: mask(i, j, doc) for mask in self.masks]
        twin.blocks = [create_block_mask(f, None, None, n, n, device="cpu") for f in makers]
        return twin.eval()


def capped_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, cap: float) -> Tensor:
    """As transformers spells it for Gemma 2: SDPA has no cap."""
    scores = torch.tanh(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 / cap) * cap
    return scores.masked_fill(~seen, -math.inf).softmax(-1) @ v


def causal_window(i: Tensor, j: Tensor, doc: Tensor) -> Tensor:
    return (j <= i) & (i - j < 1024)


def causal(i: Tensor, j: Tensor, doc: Tensor) -> Tensor:
    return j <= i


def local(i: Tensor, j: Tensor, doc: Tensor) -> Tensor:
    return (i - j).abs() <= 64


def local_and_global(i: Tensor, j: Tensor, doc: Tensor) -> Tensor:
    return ((i - j).abs() <= 256) | (i < 16) | (j < 16)


def documents(i: Tensor, j: Tensor, doc: Tensor) -> Tensor:
    return (doc[i] == doc[j]) & (j <= i)


def neighbourhood(i: Tensor, j: Tensor, doc: Tensor) -> Tensor:
    """13 x 13 neighbours in an image of 64 columns, shifted inward at its edges."""
    side, rows = 64, doc.shape[0] // 64
    seen = None
    for a, b, length in ((i // side, j // side, rows), (i % side, j % side, side)):
        first = (a - 6).clamp(0, length - 13)
        here = (first <= b) & (b < first + 13)
        seen = here if seen is None else seen & here
    assert seen is not None
    return seen


#: Masks of the layers.
MODELS: dict[str, tuple[Callable[..., Tensor], ...]] = {
    "Mistral-like window 1024": (causal_window, causal_window),
    "Gemma-like window 1024 and global with cap": (causal_window, causal),
    "ModernBERT-like window 128": (local, local),
    "Longformer-like window 512 and 16 global": (local_and_global, local_and_global),
    "neighbourhood 13 x 13": (neighbourhood, neighbourhood),
    "documents of about 1000": (documents, documents),
}
_MOST_ROUNDS = 15
CAPS = {"Gemma-like window 1024 and global with cap": 50.0}


@dataclass
class Limits:
    """Beyond what a formulation other than attncc is not run: seconds of one call, bytes of what is square in the
    length, and seconds that the row has taken before it (and that its compilation with a first call may take)."""

    seconds: float = 3.0
    bytes: float = 4e9
    row_seconds: float = 40.0


def run(
    quick: bool = False, json: Path | None = None, *, only: str = "", lengths: Sequence[int] = (),
    peers: Sequence[str] = PEERS, rounds: int = 3, limits: Limits | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure the models whose names hold one of the words `only`, print, and write `json` (its other rows stay)."""
    lengths = lengths or (LENGTHS[:1] if quick else LENGTHS)
    names = chosen(MODELS, only)
    kept = json_format.loads(json.read_text())["rows"] if json is not None and json.exists() else []
    rows: list[dict[str, Any]] = [r for r in kept if r["model"] not in names or r["length"] not in lengths]
    limits = limits or Limits()
    for name in names:
        last: dict[str, float] = {}
        for n in lengths:
            row = measured(name, n, peers, rounds, limits, last)
            rows.append(row)
            print(line(row), flush=True)
            if json is not None:
                json.write_text(json_format.dumps({**machine(), "rows": rows}, indent=1) + "\n")
    print(table({"rows": rows}))
    return {**machine(), "rows": rows}


def machine() -> dict[str, Any]:
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "processor": platform.processor()}


def example(n: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    cuts = torch.randperm(n, generator=g)[: n // 1000].sort().values
    return torch.randn(1, n, 256, generator=g), torch.bucketize(torch.arange(n), cuts)


@torch.no_grad()
def measured(
    name: str, n: int, peers: Sequence[str], rounds: int, limits: Limits, last: dict[str, float]
) -> dict[str, Any]:
    """One model at one length. `last` holds the seconds of each peer at a shorter one, as if for 4096 tokens (they grow
    with the square at most), and takes those of this one."""
    torch._dynamo.reset()
    start = time.perf_counter()
    model = Stack(MODELS[name], CAPS.get(name)).eval()
    x = example(n)
    skipped: dict[str, str] = {}
    calls: dict[str, Callable[[], Tensor]] = {}
    for peer in peers:
        why = _too_much(peer, model, n, limits, last)
        if not why and calls and time.perf_counter() - start > limits.row_seconds:
            why = f"the row had taken {limits.row_seconds:.0f} s"
        if why:
            skipped[peer] = why
            continue
        try:
            with limited(None if peer == "attncc" else limits.row_seconds):
                calls[peer] = _call(peer, model, x)
                calls[peer]()
        except Exception as error:
            skipped[peer] = f"fails: {str(error).strip().splitlines()[0][:90]}"
            calls.pop(peer, None)
    reference = next((p for p in ("eager", "flex", "inductor") if p in calls), None)
    error = None
    if reference is not None and "attncc" in calls:
        error = float((calls["attncc"]() - calls[reference]()).abs().max())
    times: dict[str, list[float]] = {p: [] for p in calls}
    memory: dict[str, float] = {}
    begun = time.perf_counter()
    for turn in range(_MOST_ROUNDS):
        if turn >= rounds and time.perf_counter() - begun > limits.seconds:
            break
        for peer, call in calls.items():
            if peer != "attncc" and sum(times[peer]) > limits.seconds:
                continue  # one sample of what is slow will do
            before = _resident("VmRSS") if turn == 0 and _forget_peak() else None
            start = time.perf_counter()
            call()
            times[peer].append(time.perf_counter() - start)
            if before is not None:
                memory[peer] = (_resident("VmHWM") - before) / 2**20
    medians = {p: statistics.median(t) for p, t in times.items()}
    last.update({p: t * (4096 / n) ** 2 for p, t in medians.items()})
    return {"model": name, "length": n, "ms": {p: t * 1e3 for p, t in medians.items()}, "peak_mb": memory,
            "skipped": skipped, "error": error}  # fmt: skip


def _too_much(peer: str, model: Stack, n: int, limits: Limits, last: dict[str, float]) -> str:
    """Why a formulation is not run, or nothing."""
    if peer == "attncc":
        return ""
    square = 4 * n * n  # a dense mask as floats; FlexAttention sums up one to make its block mask
    if model.cap is not None and peer != "flex":
        square *= 3 * model.heads  # the scores, before and after what is done to them
    if square > limits.bytes:
        return f"masks and scores would fill {square / 1e9:.1f} GB"
    if peer in last:
        expected = last[peer] * (n / 4096) ** 2
    elif peer == "flex":
        expected = 0.0  # by the blocks that it visits: not known before
    else:
        expected = len(model.masks) * model.heads * n * n * _seconds_a_pair(model.size)
    return f"about {expected:.0f} s a call" if expected > limits.seconds else ""


@contextmanager
def limited(seconds: float | None) -> Iterator[None]:
    """Raises TimeoutError inside once `seconds` have passed, as soon as Python runs."""
    if seconds is None:
        yield
        return

    def late(*_: object) -> None:
        raise TimeoutError(f"compiling and one call take over {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@cache
def _seconds_a_pair(size: int) -> float:
    """What SDPA takes for a query and a key under a mask, now."""
    q, mask = torch.randn(1, 4, 1024, size), torch.ones(1024, 1024, dtype=torch.bool)
    return min(on_cpu(lambda: scaled_dot_product_attention(q, q, q, attn_mask=mask), 1) for _ in range(3)) / (4 << 20)


def _call(peer: str, model: Stack, x: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
    if peer == "flex":
        model = model.flex(x[0].shape[1], x[1])
    backend = {"attncc": "attncc", "inductor": "inductor", "flex": "inductor"}.get(peer)
    run_it: Callable[..., Tensor] = model if backend is None else torch.compile(model, backend=backend, dynamic=False)
    return lambda: run_it(*x)


def _forget_peak() -> bool:
    """Start the kernel's record of this process's peak memory anew, without what the allocator merely holds; False
    where there is no such record."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def _resident(field: str) -> float:
    """Bytes, from /proc."""
    status = Path("/proc/self/status").read_text()
    return next(int(x.split()[1]) * 1024 for x in status.splitlines() if x.startswith(field))


def line(row: dict[str, Any]) -> str:
    parts = [f"{p} {ms:.0f} ms, {row['peak_mb'].get(p, 0):.0f} MB" for p, ms in row["ms"].items()]
    parts += [f"{p}: {why}" for p, why in row["skipped"].items()]
    return f"{row['model']}, {row['length']}: " + "; ".join(parts)


def table(report: dict[str, Any]) -> str:
    """Markdown: milliseconds and megabytes of each peer."""
    heading = "| model | tokens | " + " | ".join(PEERS) + " | best of the others / attncc |"
    lines = [heading, "|---" * (len(PEERS) + 3) + "|"]
    for row in report["rows"]:
        cells = [_cell(row, p) for p in PEERS]
        others = [ms for p, ms in row["ms"].items() if p != "attncc"]
        gain = f"{min(others) / row['ms']['attncc']:.1f}" if others and "attncc" in row["ms"] else ""
        lines.append(f"| {row['model']} | {row['length']} | " + " | ".join(cells) + f" | {gain} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any], peer: str) -> str:
    if peer not in row["ms"]:
        return row["skipped"].get(peer, "")
    return f"{row['ms'][peer]:.0f} ms, {row['peak_mb'].get(peer, 0):.0f} MB"
