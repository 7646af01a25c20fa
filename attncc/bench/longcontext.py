"""`attncc bench --suite longcontext`: masks of long contexts, forward and backward, over their visible area.

The twelve masks in closed form and the two block-sparse ones of the long-context attention benchmark, each written with
SDPA and a mask made in the graph, as a model would. Every rival computes the same attention on the same tensors and is
compared with eager before it is timed; rounds take turns, medians count. A pair of row and key that the mask lets
through counts 4 d operations forward (two products) and 10 d backward (five).
"""

from __future__ import annotations

import json as json_format
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from attncc.bench.chosen import chosen
from attncc.bench.windows import limited
from attncc.driver.backend import Collected, collecting
from attncc.runtime.measure import device_name
from attncc.runtime.memory import peak_bytes

LENGTHS = (1024, 2048, 4096, 8192)
HEADS, SIZE = 8, 64
PEERS = ("attncc", "sdpa", "flex")
WINDOW, PREFIX, GLOBAL, BLOCK = 256, 128, 16, 64
#: Beyond what a rival is not run: seconds of one call, with what compiles it.
_SECONDS = 60.0
_MOST_BYTES = 4 << 30

#: Of rows i, keys j and the data of a batch, all of which broadcast.
Mask = Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]


def _doc(i: Tensor, j: Tensor, x: dict[str, Tensor]) -> Tensor:
    return x["doc"][i] == x["doc"][j]


def _prefix_document(i: Tensor, j: Tensor, x: dict[str, Tensor]) -> Tensor:
    return _doc(i, j, x) & ((j - x["start"][j] < PREFIX) | (j <= i))


def _block_causal(i: Tensor, j: Tensor, x: dict[str, Tensor]) -> Tensor:
    return _doc(i, j, x) & (j < (i // BLOCK + 1) * BLOCK)


def _causal_blockwise(i: Tensor, j: Tensor, x: dict[str, Tensor]) -> Tensor:
    """Documents by themselves; the last of them, a question, sees all."""
    doc, last = x["doc"], x["doc"][-1]
    return (j <= i) & (_doc(i, j, x) | ((doc[i] == last) & (doc[j] != last)))


MASKS: dict[str, Mask] = {
    "full": lambda i, j, x: (i >= 0) & (j >= 0),
    "causal": lambda i, j, x: j <= i,
    "documents": _doc,
    "causal documents": lambda i, j, x: _doc(i, j, x) & (j <= i),
    "sliding window": lambda i, j, x: (j <= i) & (i - j <= WINDOW),
    "sliding window both ways": lambda i, j, x: (i - j).abs() <= WINDOW,
    "shared question": lambda i, j, x: (j <= i) & (_doc(i, j, x) | (x["doc"][j] == 0)),
    "causal blockwise": _causal_blockwise,
    "prefix LM": lambda i, j, x: (j < PREFIX) | (j <= i),
    "prefix LM documents": _prefix_document,
    "global and sliding": lambda i, j, x: ((i - j).abs() <= WINDOW) | (i < GLOBAL) | (j < GLOBAL),
    "block-causal documents": _block_causal,
    "uniform blocks": lambda i, j, x: x["uniform"][i // BLOCK, j // BLOCK],
    "variable blocks": lambda i, j, x: x["variable"][x["block"][i], x["block"][j]],
}


def data(n: int) -> dict[str, Tensor]:
    """Documents of about a thousand tokens, and block maps of which a quarter is kept; their diagonal always is."""
    g = torch.Generator().manual_seed(0)
    cuts = torch.randperm(n - 1, generator=g)[: max(1, n // 1000)].add(1).sort().values
    doc = torch.bucketize(torch.arange(n), cuts, right=True)
    start = torch.cat([torch.zeros(1, dtype=torch.int64), cuts])[doc]
    edges = torch.randperm(n - 1, generator=g)[: n // 96].add(1).sort().values
    blocks, parts = -(-n // BLOCK), int(edges.numel()) + 1
    return {
        "doc": doc, "start": start, "block": torch.bucketize(torch.arange(n), edges, right=True),
        "uniform": (torch.rand(blocks, blocks, generator=g) < 0.25) | torch.eye(blocks, dtype=torch.bool),
        "variable": (torch.rand(parts, parts, generator=g) < 0.25) | torch.eye(parts, dtype=torch.bool),
    }  # fmt: skip


def attention(mask: Mask) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, x: dict[str, Tensor]) -> Tensor:
        tokens = torch.arange(q.shape[-2], device=q.device)
        return scaled_dot_product_attention(q, k, v, attn_mask=mask(tokens[:, None], tokens[None], x))

    return run


def run(
    quick: bool = False, json: Path | None = None, *, only: str = "", lengths: Sequence[int] = (), rounds: int = 5
) -> dict[str, Any]:
    """Measure the masks whose names hold one of the words of `only`, print a table, and write `json` after each row."""
    names = chosen(MASKS, only)
    found: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads(),
                             "processor": device_name(torch.device("cpu")), "machine": platform.machine(),
                             "rows": []}  # fmt: skip
    for name in names:
        for n in lengths or (LENGTHS[:1] if quick else LENGTHS):
            for trains in (False, True):
                row = measured(name, n, trains=trains, rounds=3 if quick else rounds)
                found["rows"].append(row)
                print(line(row), flush=True)
                if json is not None:
                    json.write_text(json_format.dumps(found, indent=1) + "\n")
    print(table(found["rows"]))
    return found


def measured(name: str, n: int, *, trains: bool, rounds: int) -> dict[str, Any]:
    """One mask at one length: milliseconds, operations over the visible area, and peak memory of each rival."""
    torch._dynamo.reset()
    mask, x = MASKS[name], data(n)
    tokens = torch.arange(n)
    pairs = sum(int(mask(rows[:, None], tokens[None], x).sum()) for rows in tokens.split(1024)) * HEADS
    g = torch.Generator().manual_seed(1)
    q, k, v, seed = (torch.randn(1, HEADS, n, SIZE, generator=g) for _ in range(4))
    skipped: dict[str, str] = {}
    status = ""
    calls: dict[str, Callable[[], list[Tensor]]] = {}
    for peer in PEERS:
        try:
            with limited(_SECONDS if peer != "attncc" else None):
                call, status_of = _form(peer, mask, x, n)
                calls[peer] = _step(call, (q, k, v), seed, trains=trains)
                calls[peer]()
                status = status or status_of()
        except Exception as why:  # a rival may fail in any way of its own
            calls.pop(peer, None)
            skipped[peer] = (str(why).strip().splitlines() or [type(why).__name__])[0][:90]
    errors = _errors(calls, _step(attention(mask), (q, k, v), seed, trains=trains), x)
    times: dict[str, list[float]] = {p: [] for p in calls}
    for turn in range(rounds):
        for peer in list(calls) if turn % 2 == 0 else list(calls)[::-1]:
            start = time.perf_counter()
            calls[peer]()
            times[peer].append(time.perf_counter() - start)
    device = torch.device("cpu")
    operations = pairs * SIZE * (14 if trains else 4)
    medians = {p: statistics.median(t) for p, t in times.items()}
    peaks = {p: peak_bytes(call, device) for p, call in calls.items()}
    return {
        "mask": name, "length": n, "trains": trains, "status": status, "skipped": skipped, "error": errors,
        "density": pairs / HEADS / n / n, "ms": {p: t * 1e3 for p, t in medians.items()},
        "gflops": {p: operations / t / 1e9 for p, t in medians.items()},
        "peak_mb": {p: b / 2**20 for p, b in peaks.items() if b is not None},
    }  # fmt: skip


def _form(
    peer: str, mask: Mask, x: dict[str, Tensor], n: int
) -> tuple[Callable[..., Tensor], Callable[[], str]]:  # fmt: skip
    """The attention as a rival has it, and what attncc made of it once it ran."""
    if peer == "sdpa":
        if n * n * 4 > _MOST_BYTES:
            raise ValueError(f"its mask would fill {n * n * 4 / 2**30:.0f} GiB")
        compiled = torch.compile(attention(mask), backend="inductor", dynamic=False)
        return lambda q, k, v: compiled(q, k, v, x), lambda: ""
    if peer == "flex":
        block = create_block_mask(lambda b, h, i, j: mask(i, j, x), None, None, n, n, device="cpu")
        flex: Any = torch.compile(flex_attention, dynamic=False)
        return lambda q, k, v: flex(q, k, v, block_mask=block), lambda: ""
    own = torch.compile(attention(mask), backend="attncc", dynamic=False)
    found = Collected()

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        token = collecting.set(found)
        try:
            return own(q, k, v, x)
        finally:
            collecting.reset(token)

    return call, lambda: found.sites[0].status if found.sites else "not found"


def _step(
    call: Callable[..., Tensor], given: Sequence[Tensor], seed: Tensor, *, trains: bool
) -> Callable[..., list[Tensor]]:  # fmt: skip
    """A call, with the gradients of its tensors where the model trains."""
    leaves = [t.clone().requires_grad_(trains) for t in given]

    def run(*more: Any) -> list[Tensor]:
        with torch.set_grad_enabled(trains):
            out = call(*leaves, *more)
            return [out.detach(), *(torch.autograd.grad(out, leaves, seed) if trains else ())]

    return run


def _errors(
    calls: dict[str, Callable[[], list[Tensor]]], eager: Callable[..., list[Tensor]], x: dict[str, Tensor]
) -> dict[str, float]:  # fmt: skip
    """The largest difference of each rival's results from eager's, by the largest of them. Raises RuntimeError where
    attncc's are wrong."""
    want = eager(x)
    errors = {
        p: max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(call(), want, strict=True))
        for p, call in calls.items()
    }
    if not errors.get("attncc", math.inf) < 1e-4:
        raise RuntimeError(f"the result differs from eager by {errors.get('attncc')}")
    return errors


def line(row: dict[str, Any]) -> str:
    what = "forward and backward" if row["trains"] else "forward"
    parts = [f"{p} {ms:.1f} ms, {row['gflops'][p]:.0f} GFLOP/s" for p, ms in row["ms"].items()]
    parts += [f"{p}: {why}" for p, why in row["skipped"].items()]
    shown = f"{what} ({row['density']:.0%} visible, {row['status']})"
    return f"{row['mask']}, {row['length']}, {shown}: " + "; ".join(parts)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: operations per second over the visible area and peak memory of each rival, by mask and length."""
    lines = ["| mask | tokens | visible | | " + " | ".join(PEERS) + " | best of the others / attncc |",
             "|---" * (len(PEERS) + 5) + "|"]  # fmt: skip
    for row in rows:
        others = [ms for p, ms in row["ms"].items() if p != "attncc"]
        gain = f"{min(others) / row['ms']['attncc']:.2f}" if others and "attncc" in row["ms"] else ""
        kept = "" if row["status"] == "fused" else f" ({row['status']})"
        what = "with backward" if row["trains"] else "forward"
        cells = [
            f"{row['gflops'][p]:.0f} GFLOP/s, {row['peak_mb'].get(p, 0):.0f} MB" if p in row["ms"]
            else row["skipped"].get(p, "") for p in PEERS
        ]  # fmt: skip
        lines.append(f"| {row['mask']} | {row['length']} | {row['density']:.1%} | {what}{kept} | " + " | ".join(cells)
                     + f" | {gain} |")  # fmt: skip
    return "\n".join(lines)
