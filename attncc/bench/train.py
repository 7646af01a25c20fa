"""`attncc bench --suite train`: forward and backward together, beside SDPA and Inductor, in one process, taking turns.

Every rival computes the same attention on the same tensors, and the gradients of all of them: queries, keys, values,
and the tables, slopes and biases that the score reads. SDPA's mask of a bias that learns is made in every step, as a
model has to; each step draws anew which weights it drops. Ratios are medians of the ratios within a turn; gradients are
compared with those in a wider type before they are timed, but those of rivals where weights are dropped: they drop
others.
"""

from __future__ import annotations

import json as json_module
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from attncc.bench import cpu_rows
from attncc.bench.chosen import chosen
from attncc.bench.cpu import in_dtype, keep, product_rate, report_of, samples_of, threads_set, write
from attncc.bench.cpu_rivals import Call, Tensors, inductor, sdpa
from attncc.bench.cpu_rows import CpuRow
from attncc.bench.row import Row, visible_pairs
from attncc.frontends.targets import TargetError
from attncc.ir import Attention, parse_attention, print_attention
from attncc.ir.evaluate import DTYPE_OF
from attncc.kernels.build import blocked, built
from attncc.kernels.gradients import described

DTYPES = ("f32", "bf16", "f16")
#: Products of a step: two of forward, five of backward, each two operations.
_PRODUCTS = 7


@dataclass(frozen=True)
class TrainRow:
    """A row with what it is meant to reach against SDPA, by dtype."""

    row: CpuRow
    least: dict[str, float]


def rows(*, quick: bool) -> list[TrainRow]:
    """What is measured."""
    causal, window, bias = {"f32": 1.8, "bf16": 2.2}, {"f32": 15.0, "bf16": 15.0}, dict[str, float]()
    small, documents = {"f32": 1.2, "bf16": 1.2}, {"f32": 6.0, "bf16": 6.0}
    if quick:
        return [
            TrainRow(cpu_rows.causal(1024), {}), TrainRow(cpu_rows.window(1024, 256), {}),
            TrainRow(cpu_rows.alibi(1024), {}), TrainRow(cpu_rows.small("BERT", 8, 128), small),
        ]  # fmt: skip
    return [
        TrainRow(cpu_rows.causal(2048), causal), TrainRow(cpu_rows.causal(4096), causal),
        TrainRow(cpu_rows.window(4096, 256), window), TrainRow(cpu_rows.documents(4096, 8), documents),
        TrainRow(cpu_rows.dense(2048), {}), TrainRow(cpu_rows.prefix_lm(2048, 512), {}),
        TrainRow(cpu_rows.t5_bias(2048), bias), TrainRow(cpu_rows.alibi(2048), bias),
        TrainRow(cpu_rows.soft_cap(2048), bias), TrainRow(cpu_rows.swin(64, 4), {}),
        TrainRow(cpu_rows.small("ViT", 4, 197), small), TrainRow(cpu_rows.small("BERT", 8, 128), small),
        TrainRow(dropped(cpu_rows.small("BERT", 8, 128)), {}), TrainRow(dropped(cpu_rows.causal(1024)), {}),
    ]  # fmt: skip


def dropped(x: CpuRow, share: float = 0.1) -> CpuRow:
    """The row with a share of its weights left out."""
    return CpuRow(replace(x.row, name=f"{x.row.name} dropped {share:g}", dropped=share))


def trained(row: Row) -> str:
    """The IR text of a row as it is trained."""
    return print_attention(parse_attention(row.text.replace("give   out", "give   out, lse")))


def measure_row(x: TrainRow, seconds: float) -> dict[str, Any]:
    """Milliseconds of a step of each rival, ratios to ours, how far the gradients of each are off, and what ran."""
    row, spec = x.row.row, trained(x.row.row)
    a = parse_attention(spec)
    t = {n: v.requires_grad_(v.is_floating_point()) for n, v in row.tensors(torch.device("cpu")).items()}
    learned = [v for v in t.values() if v.requires_grad]
    names = tuple(n.name for n in a.tensors if t[n.name].requires_grad)
    shape = t["q"].shape
    seed = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(t["q"].dtype)

    def step(out: Callable[[], Any]) -> Callable[[], tuple[torch.Tensor, ...]]:
        def run() -> tuple[torch.Tensor, ...]:
            with torch.enable_grad():
                return torch.autograd.grad(out(), learned, seed)

        return run

    def own() -> torch.Tensor:
        if row.dropped and not fixed:
            t["words"] = row.words()
        return torch.ops.attncc.attention([t[n.name] for n in a.tensors], [], spec)[0].view(shape)

    fixed = True  # while gradients are compared with those of the same words
    calls: dict[str, Call] = {"attncc": step(own)}
    absent: dict[str, str] = {}
    exact = _exact(a, t, learned, seed)

    def error(found: Iterable[torch.Tensor]) -> float:
        return max(_apart(g, w) for g, w in zip(found, exact, strict=True))

    errors: dict[str, float] = {"attncc": error(step(own)())}
    if not errors["attncc"] <= _most(row.dtype):
        raise RuntimeError(f"{row.name} in {row.dtype}: gradients are off by {errors['attncc']:.2g}")
    for name, rival in {"sdpa": _sdpa, "inductor": inductor}.items():
        try:
            calls[name] = run = step(rival(row, t))  # type: ignore[operator]
            given = run()
            if not row.dropped:  # another stream drops others
                errors[name] = error(given)
        except Exception as why:  # a rival may fail in any way of its own
            calls.pop(name, None)
            absent[name] = (str(why).splitlines() or [type(why).__name__])[0]
    fixed = False
    samples = samples_of(calls, absent, seconds, set(calls))
    median = {n: statistics.median(s) for n, s in samples.items()}
    pairs = visible_pairs(row, t)
    return {
        "row": row.name, "dtype": row.dtype, "threads": torch.get_num_threads(), "absent": absent, "error": errors,
        "forward": built(spec, "cpu").shown, "backward": described(a, names, "cpu")[0],
        "ms": {n: s * 1e3 for n, s in median.items()}, "rounds": len(samples["attncc"]),
        "ratio": {n: statistics.median(y / z for y, z in zip(s, samples["attncc"], strict=False))
                  for n, s in samples.items() if n != "attncc"},
        "gflops": 2 * _PRODUCTS * row.d * pairs / median["attncc"] / 1e9,
        "least": x.least.get(row.dtype),
    }  # fmt: skip


def _exact(
    a: Attention, t: Tensors, learned: Sequence[torch.Tensor], seed: torch.Tensor
) -> list[torch.Tensor]:  # fmt: skip
    """The gradients of the tensors `learned` by the plain form in a wider type, which neither rival computes in."""
    wide = "f64" if a.dtype == "f32" else "f32"
    tensors = tuple(replace(x, dtype=wide) if x.kind == "float" else x for x in a.tensors)
    own = {id(x): x.detach().to(DTYPE_OF[wide]).requires_grad_() for x in learned}
    given = [own.get(id(t[x.name]), t[x.name]) for x in a.tensors]
    with torch.enable_grad():
        out = blocked(replace(a, tensors=tensors, dtype=wide), given, [])[0].view(seed.shape)
        return list(torch.autograd.grad(out, list(own.values()), seed.to(out.dtype)))


def _sdpa(row: Row, t: Tensors) -> Call:
    if row.score_mod is None:
        return sdpa(row, t)
    sdpa(row, t)  # refuses what SDPA cannot say
    return lambda: sdpa(row, t)()


def _apart(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x.float() - y.float()).abs().max() / y.float().abs().max().clamp_min(1e-30))


def _most(dtype: str) -> float:
    """How far gradients of two ways may be apart, relative to the largest."""
    return {"f32": 1e-4, "bf16": 6e-2, "f16": 1e-2}[dtype]


def line(done: dict[str, Any]) -> str:
    """One row as text."""
    ratios = "  ".join(f"{n} {r:.2f}x" for n, r in done["ratio"].items())
    goal = f"  [SDPA x >= {done['least']:g}]" if done["least"] else ""
    start = f"{done['row']:22} {done['dtype']:5}{done['threads']} {done['ms']['attncc']:9.2f} ms"
    why = "".join(f"  no {n}: {reason}" for n, reason in done["absent"].items())
    return f"{start} {done['gflops']:5.0f} GF/s  {ratios}{goal}  backward: {done['backward']}{why}"


def run(
    quick: bool = False, json: Path | None = None, *, only: str = "", dtypes: Sequence[str] = (),
    threads: Sequence[int] = (),
) -> dict[str, Any]:  # fmt: skip
    """Measures (every row in f32 and bf16, with one thread unless told), prints, writes, returns the report."""
    unknown = [x for x in dtypes if x not in DTYPES]
    if unknown:
        raise TargetError(f"bench: no dtype {', '.join(unknown)}; there are {', '.join(DTYPES)}")
    every = {x.row.row.name: x for x in rows(quick=quick)}
    named = [every[name] for name in chosen(every, only)]
    report = report_of(json)
    for count in threads or [1]:
        with threads_set(count):
            for dtype in dtypes or DTYPES[:2]:
                for x in named:
                    torch.compiler.reset()
                    done = measure_row(TrainRow(in_dtype(x.row, dtype), x.least), 0.5 if quick else 1.0)
                    done["mm_gflops"] = product_rate(DTYPE_OF[dtype])
                    print(line(done), flush=True)
                    keep(report, done)
                    write(json, json_module.dumps(report, indent=1) + "\n")
    return report
