"""`attncc bench --suite cpu`: attncc's kernels beside SDPA, FlexAttention and Inductor, in one process, taking turns.

Every rival computes the same attention on the same tensors; one that cannot, or would take too long, is left out with
its reason. Ratios are medians of the ratios within a turn. Every result is compared with eager attention in float32
before anything is timed.
"""

from __future__ import annotations

import datetime
import json as json_module
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from attncc.bench.chosen import chosen
from attncc.bench.cpu_rivals import RIVALS, Call, Tensors, eager, ours, spec
from attncc.bench.cpu_rows import EVERY, CpuRow, rows
from attncc.bench.report import line, markdown, plot
from attncc.bench.row import Row, visible_pairs
from attncc.frontends.targets import TargetError
from attncc.ir.evaluate import DTYPE_OF
from attncc.kernels.build import build_all
from attncc.runtime.cpp import detect_isa
from attncc.runtime.measure import device_name, on_cpu

_SAMPLE_S = 300e-6  # a sample takes at least this long, by several calls where one is shorter
_LEAST_ROUNDS, _MOST_ROUNDS = 3, 60


def in_dtype(row: CpuRow, dtype: str) -> CpuRow:
    return replace(row, row=replace(row.row, dtype=dtype), plain=row.plain and replace(row.plain, dtype=dtype))


def error_of(row: Row, t: Tensors, out: torch.Tensor) -> float:
    """Largest difference from eager attention in float32 over at most 128 of the query rows."""
    at = torch.linspace(0, row.rows - 1, min(row.rows, 128)).round().long().unique()
    exact = {n: x.float() if x.is_floating_point() else x for n, x in t.items()}
    want = eager(row, exact, at)(exact["q"][:, :, at], exact["k"], exact["v"])
    return (out[:, :, at].float() - want).abs().max().item()


def checked(row: Row, t: Tensors) -> tuple[Call, float]:
    """Our kernel's call, run once, and its error. Raises RuntimeError where that is beyond a few roundings."""
    call, out = ours(row, t)
    call()
    largest = 4 * torch.finfo(out.dtype).eps * max(1.0, t["v"].abs().max().item())
    error = error_of(row, t, out)
    if not error <= largest:  # torch's own first parallel tanh of a process is now and then off by 1e-4
        error = error_of(row, t, out)
    if not error <= largest:
        raise RuntimeError(f"{row.name} in {row.dtype}: the kernel differs from eager by {error}")
    return call, error


def measure_row(row: CpuRow, seconds: float, rivals: Sequence[str]) -> dict[str, Any]:
    """Milliseconds of each rival, ratios to ours, errors, and why a rival is absent; about `seconds` of timing."""
    t = row.row.tensors(torch.device("cpu"))
    call, error = checked(row.row, t)
    calls: dict[str, Call] = {"attncc": call}
    absent: dict[str, str] = {}
    errors = {"attncc": error}
    warm = {"attncc"}
    for name in rivals:
        try:
            calls[name] = RIVALS[name](row, t)
            if name == "sdpa":
                errors[name] = error_of(row.row, t, calls[name]())  # type: ignore[arg-type]
                warm.add(name)
        except Exception as why:  # a rival may fail in any way of its own
            absent[name] = (str(why).splitlines() or [type(why).__name__])[0]
    samples = samples_of(calls, absent, seconds, warm)
    own = samples["attncc"]
    pairs = visible_pairs(row.row, t)
    element = t["k"].element_size()
    median = {n: statistics.median(x) for n, x in samples.items()}
    result: dict[str, Any] = {
        "row": row.row.name, "dtype": row.row.dtype, "threads": torch.get_num_threads(), "absent": absent,
        "ms": {n: x * 1e3 for n, x in median.items()}, "error": errors, "rounds": len(own),
        "spread": {n: _spread(x) for n, x in samples.items() if len(x) >= _LEAST_ROUNDS},
        "density": _density(row.row, pairs),
        "ratio": {n: statistics.median(x / y for x, y in zip(s, own, strict=False))
                  for n, s in samples.items() if n != "attncc"},
        "gflops": 4 * row.row.d * pairs / median["attncc"] / 1e9,
        "gb_per_s": 2 * row.row.batch * row.row.heads * row.row.keys * row.row.d * element / median["attncc"] / 1e9,
        "goals": [{"than": g.than, "least": g.least[row.row.dtype]} for g in row.goals if row.row.dtype in g.least],
        "decode": "read" in samples,
    }  # fmt: skip
    return result


def _density(row: Row, pairs: int) -> float:
    return pairs / (row.batch * row.heads * row.group * row.rows * row.keys)


def _spread(samples: list[float]) -> float:
    """How far the middle half of the samples lies apart, by their median: what the machine's noise is."""
    low, middle, high = statistics.quantiles(samples, n=4)
    return (high - low) / middle


def samples_of(
    calls: dict[str, Call], absent: dict[str, str], seconds: float, warm: set[str]
) -> dict[str, list[float]]:
    """Seconds of a call, a list for each rival, one number a turn. A rival whose call takes longer than `seconds` is
    called once after its warm-up (those in `warm` had theirs); one that raises goes to `absent`."""
    repeats: dict[str, int] = {}
    slow: dict[str, float] = {}
    for name in list(calls):
        try:
            if name not in warm:
                calls[name]()
            once = on_cpu(calls[name], 1)
        except Exception as why:
            if name == "attncc":
                raise
            del calls[name]
            absent[name] = (str(why).splitlines() or [type(why).__name__])[0]
            continue
        repeats[name] = max(1, min(1000, round(_SAMPLE_S / max(once, 1e-9))))
        if once > seconds and name != "attncc":
            slow[name] = once
    samples: dict[str, list[float]] = {n: [slow[n]] if n in slow else [] for n in calls}
    start = time.perf_counter()
    for turn in range(_MOST_ROUNDS):
        if turn >= _LEAST_ROUNDS and time.perf_counter() - start > seconds:
            break
        for name, call in calls.items():
            if name not in slow:
                samples[name].append(on_cpu(call, repeats[name]))
    return samples


def product_rate(dtype: torch.dtype) -> float:
    """GF/s of a square product: what the machine's library reaches now."""
    a = torch.randn(1024, 1024).to(dtype)
    torch.mm(a, a)
    return 2 * 1024**3 / min(on_cpu(lambda: torch.mm(a, a), 2) for _ in range(3)) / 1e9


@contextmanager
def threads_set(n: int) -> Iterator[None]:
    """torch's number of threads, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _chosen(wanted: str, *, quick: bool) -> list[CpuRow]:
    every = rows(quick=quick)
    names = chosen((r.row.name for r in every), wanted)
    return [r for r in every if r.row.name in names]


def _rivals(dtype: str, threads: int, wanted: Sequence[str]) -> list[str]:
    """Those wanted; else all, but the ones that take long to compile only where they matter most."""
    if wanted:
        return [n for n in RIVALS if n in wanted]
    compiled = {"inductor", "flex", "flex + mask"}
    return [n for n in RIVALS if n not in compiled or (threads == 1 and dtype != "f16")]


def run(
    quick: bool = False, json: Path | None = None, *, only: str = "", dtypes: Sequence[str] = (),
    threads: Sequence[int] = (), rivals: Sequence[str] = (), picture: Path | None = None, table: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measures (rows of every dtype, with 1 and 2 threads unless told), prints, writes, returns the report.

    A row that `json` already holds is measured anew; the others stay, so a suite can be measured in parts."""
    for what, asked, there in (("dtype", dtypes, EVERY), ("rival", rivals, tuple(RIVALS))):
        unknown = [x for x in asked if x not in there]
        if unknown:
            raise TargetError(f"bench: no {what} {', '.join(unknown)}; there are {', '.join(there)}")
    named = _chosen(only, quick=quick)
    kinds = [d for d in EVERY if d in (dtypes or EVERY[: 2 if quick else 3])]
    counts = list(threads) or ([1] if quick else [1, 2])
    report = report_of(json)
    wanted = [in_dtype(r, d) for d in kinds for r in named]
    build_all((spec(x), "cpu") for r in wanted for x in (r.row, r.plain) if x is not None)
    for count in counts if wanted else ():
        with threads_set(count), torch.no_grad():
            for row in wanted:
                torch.compiler.reset()
                done = _measured(row, _rivals(row.row.dtype, count, rivals), 0.5 if quick else 1.0)
                print(line(done), flush=True)
                keep(report, done)
                write(json, json_module.dumps(report, indent=1) + "\n")
    write(picture, lambda: plot(report))
    write(table, lambda: markdown(report))
    return report


def _measured(row: CpuRow, rivals: Sequence[str], seconds: float) -> dict[str, Any]:
    before = product_rate(DTYPE_OF[row.row.dtype])
    done = measure_row(row, seconds, rivals)
    done["mm_gflops"] = max(before, product_rate(DTYPE_OF[row.row.dtype]))
    done["when"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return done


def report_of(path: Path | None) -> dict[str, Any]:
    """An empty report of this machine, or the one that `path` holds."""
    try:
        own = version("attncc")
    except PackageNotFoundError:
        own = "unknown"
    machine = {"processor": device_name(torch.device("cpu")), "isa": detect_isa(), "torch": torch.__version__,
               "attncc": own}  # fmt: skip
    if path is not None and path.exists():
        before = json_module.loads(path.read_text(encoding="utf-8"))
        if before.get("machine") == machine:
            return before
        raise TargetError(f"bench: {path} was measured on {before.get('machine')}, not on {machine}")
    return {"machine": machine, "rows": []}


def keep(report: dict[str, Any], done: dict[str, Any]) -> None:
    """Put a row into a report, in the place of what it was."""
    same = ("row", "dtype", "threads")
    report["rows"] = [r for r in report["rows"] if any(r[x] != done[x] for x in same)] + [done]


def write(path: Path | None, text: str | Callable[[], str]) -> None:
    """Write a file that was asked for."""
    if path is not None:
        path.write_text(text if isinstance(text, str) else text(), encoding="utf-8")
