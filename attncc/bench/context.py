"""Rows and keys cut over processes of one machine: keys gathered, and keys taken in turns, forward and backward.

Processes share the machine's cores, so what is given is the processor's time of the process that works longest, with
one thread each: what a call takes where each has a core, without the network. Peaks are what a call allocates at once
in the process that needs most.
"""

from __future__ import annotations

import json as json_
import os
import statistics
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from attncc.bench.chosen import chosen
from attncc.runtime import sharding
from attncc.runtime.memory import peak_bytes

_dist: Any = dist
_mp: Any = mp

HEADS, SIZE = 8, 64
WHAT = ("forward", "both")
MASKS = {
    "dense": "True", "causal": "j <= i", "window": "j <= i and i < j + {window}",
    "documents": "j <= i and doc[i] == doc[j]",
}  # fmt: skip
SPEC = """attention
batch  b = 1, h = {heads}
axis   i = {n}, j = {n}, d = {d}, e = {d}
tensor q: f32[1, {heads}, {n}, {d}]
tensor k: f32[1, {heads}, {n}, {d}]
tensor v: f32[1, {heads}, {n}, {d}]
{tensors}q      q[b, h, i, d]
k      k[b, h, j, d]
v      v[b, h, j, e]
score  s * 0.125
mask   {mask}
norm   softmax
empty  zero
weight w
give   out, lse
dtype  f32
"""


def spec_of(name: str, n: int) -> str:
    """The attention of a mask over `n` tokens; a window is an eighth of them."""
    mask = MASKS[name].format(window=n // 8)
    tensors = f"tensor doc: i64[{n}]\n" if "doc" in mask else ""
    return SPEC.format(heads=HEADS, d=SIZE, n=n, mask=mask, tensors=tensors)


def _process(rank: int, world: int, folder: str, names: list[str], n: int, rounds: int, found: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415 - after the group
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor  # noqa: PLC0415 - as above

    torch.set_num_threads(1)
    store = _dist.FileStore(str(Path(folder) / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(minutes=10))
    mesh = init_device_mesh("cpu", (world,))
    sharding.install()
    r = torch.Generator().manual_seed(0)
    whole = [torch.randn(1, HEADS, n, SIZE, generator=r) for _ in range(3)]
    documents = (torch.arange(n) * 5 // n).square()  # five, of one length
    for name in names:
        spec = spec_of(name, n)
        parts: list[Any] = [distribute_tensor(x, mesh, [Shard(2)]).requires_grad_() for x in whole]
        more = [distribute_tensor(documents, mesh, [Replicate()])] if "doc" in spec else []
        times: dict[tuple[str, str], list[float]] = {}

        def forward() -> Any:
            return torch.ops.attncc.attention([*parts, *more], [], spec)[0]  # noqa: B023 - called at once

        def both() -> Any:
            return torch.autograd.grad(forward().square().sum(), parts)  # noqa: B023 - as above

        for at in range(rounds + 1):
            for how in ("gather", "ring"):
                os.environ[sharding.CONTEXT] = how
                for what, call in (("forward", forward), ("both", both)):
                    dist.barrier()
                    start = time.process_time()
                    call()
                    if at:
                        times.setdefault((how, what), []).append(time.process_time() - start)
        for how in ("gather", "ring"):
            os.environ[sharding.CONTEXT] = how
            peak = peak_bytes(both, torch.device("cpu"))
            dist.barrier()
            for what in WHAT:
                found[name, how, what, rank] = statistics.median(times[how, what]), peak
    dist.destroy_process_group()


def run(*, quick: bool = False, json: Path | None = None, only: str = "") -> list[dict[str, Any]]:
    """Measure on two and four processes; prints a line a row. `only`: masks whose names hold one of these words."""
    names = chosen(MASKS, only)
    n, rounds = (1024, 2) if quick else (4096, 5)
    rows: list[dict[str, Any]] = []
    for world in (2, 4) if names else ():
        with mp.get_context("spawn").Manager() as manager, tempfile.TemporaryDirectory() as folder:
            found: Any = manager.dict()
            given = (world, folder, names, n, rounds, found)
            _mp.start_processes(_process, given, world, start_method="spawn")
            measured: dict[tuple[str, str, str, int], tuple[float, int | None]] = dict(found)
        for name in names:
            row: dict[str, Any] = {"mask": name, "processes": world, "tokens": n}
            for how in ("gather", "ring"):
                own = {k: x for k, x in measured.items() if k[:2] == (name, how)}
                row[how] = {what: 1e3 * max(x[0] for k, x in own.items() if k[2] == what) for what in WHAT}
                row[how]["peak_mb"] = max((x[1] or 0) for x in own.values()) / 2**20
            rows.append(row)
            print(line(row), flush=True)
    if json is not None:
        json.write_text(json_.dumps(rows, indent=1))
    return rows


def line(row: dict[str, Any]) -> str:
    parts = [
        f"{how} {row[how]['forward']:.0f} ms, with backward {row[how]['both']:.0f} ms, {row[how]['peak_mb']:.0f} MB"
        for how in ("gather", "ring")
    ]
    return f"{row['mask']}, {row['tokens']} tokens on {row['processes']} processes: " + "; ".join(parts)
