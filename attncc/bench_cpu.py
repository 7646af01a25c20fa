"""`attncc bench --suite cpu`: attncc's kernels beside SDPA, FlexAttention and Inductor, in one process, taking turns.

Each case is an attention's IR, tensors for it, and the same attention in torch: the best SDPA formulation there is (its
causal flag, grouped queries folded onto their keys in decode), the unfused expression for Inductor, and for some a
FlexAttention program. Rounds take turns, medians count, every result is compared with SDPA's before it is timed.
"""

from __future__ import annotations

import json as json_format
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from attncc.ir import parse_attention, print_attention
from attncc.kernels import built
from attncc.runtime.cpp import detect_isa

_TEXT = """attention
size   B, N, M
batch  b = B, hk = {heads}, g = {groups}
axis   i = N, j = M, d = {d}, e = {d}
tensor q: {dtype}[B, {all_heads}, N, {d}]
tensor k: {dtype}[B, {heads}, M, {d}]
tensor v: {dtype}[B, {heads}, M, {d}]
{tensors}
q      q[b, hk * {groups} + g, i, d]
k      k[b, hk, j, d]
v      v[b, hk, j, e]
score  {score}
mask   {mask}
norm   softmax
empty  zero
weight w
give   out
dtype  {dtype}
"""
_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
Make = Callable[["Case", torch.dtype], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """Shapes, the IR's score and mask, and how to say the same to SDPA: `flags`, and `mask_of` for a dense mask."""

    name: str
    n: int
    m: int
    d: int = 64
    b: int = 1
    heads: int = 8
    groups: int = 1
    score: str = "s * {scale}"
    mask: str = "True"
    tensors: dict[str, Make] = field(default_factory=dict[str, Make])  # declaration -> tensor
    causal: bool = False
    dense_mask: Callable[[Case, dict[str, torch.Tensor]], torch.Tensor] | None = None
    capped: float = 0.0
    visible: float = 1.0  # share of the query-key pairs

    def text(self, dtype: str) -> str:
        values: dict[str, object] = {
            "heads": self.heads, "groups": self.groups, "all_heads": self.heads * self.groups, "d": self.d,
            "dtype": dtype, "scale": repr(self.d**-0.5),
        }  # fmt: skip
        tensors = "\n".join(f"tensor {t}".format(**values) for t in self.tensors)
        score, mask = self.score.format(**values), self.mask.format(**values)
        return _TEXT.format(**values, tensors=tensors, score=score, mask=mask)


def _grid(c: Case) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(c.n)[:, None], torch.arange(c.m)[None, :]


def _window(width: int) -> Callable[[Case, dict[str, torch.Tensor]], torch.Tensor]:
    def mask(c: Case, _: dict[str, torch.Tensor]) -> torch.Tensor:
        i, j = _grid(c)
        return (j <= i) & (i - j < width)

    return mask


def _documents(c: Case, t: dict[str, torch.Tensor]) -> torch.Tensor:
    i, j = _grid(c)
    return (t["doc"][:, None] == t["doc"][None, :]) & (j <= i)


def _prefix(c: Case, _: dict[str, torch.Tensor]) -> torch.Tensor:
    i, j = _grid(c)
    return (j <= i) | (j < c.m // 4)


def _neighbours(c: Case, _: dict[str, torch.Tensor]) -> torch.Tensor:
    i, j = _grid(c)
    return ((i // 32 - j // 32).abs() <= 3) & ((i % 32 - j % 32).abs() <= 3)


def _slopes(c: Case, t: dict[str, torch.Tensor]) -> torch.Tensor:
    i, j = _grid(c)
    return (-t["slope"][:, None, None] * (i - j)).masked_fill(j > i, -torch.inf)[None]


_BIAS: dict[str, Make] = {"bias: {dtype}[{heads}, N, M]": lambda c, dtype: torch.randn(c.heads, c.n, c.m).to(dtype)}
_DOC: dict[str, Make] = {"doc: i32[M]": lambda c, _: (torch.arange(c.m) // (c.m // 4 + 17)).to(torch.int32)}
_SLOPE: dict[str, Make] = {"slope: f32[{heads}]": lambda c, _: 2.0 ** -torch.arange(1, c.heads + 1)}


def cases(*, quick: bool) -> list[Case]:
    """The suite; `quick` keeps one length of each kind."""
    out: list[Case] = []
    for n in [1024] if quick else [1024, 4096]:
        scale = "s * {scale}"
        out += [
            Case(f"dense {n}", n, n),
            Case(f"causal {n}", n, n, mask="j <= i", causal=True, visible=0.5),
            Case(f"window 256 at {n}", n, n, mask="j <= i and i - j < 256", dense_mask=_window(256),
                 visible=256 / n),
            Case(f"documents {n}", n, n, mask="j <= i and doc[i] == doc[j]", tensors=_DOC, dense_mask=_documents,
                 visible=0.13),
            Case(f"prefix {n}", n, n, mask="j <= i or j < M // 4", dense_mask=_prefix, visible=0.53),
            Case(f"bias {n}", n, n, score=scale + " + bias[hk, i, j]", tensors=_BIAS,
                 dense_mask=lambda c, t: t["bias"][None]),
            Case(f"alibi {n}", n, n, score=scale + " - slope[hk] * float(i - j)", mask="j <= i", tensors=_SLOPE,
                 dense_mask=_slopes, visible=0.5),
            Case(f"softcap {n}", n, n, score="tanh(s * {scale} / 50.0) * 50.0", capped=50.0),
        ]  # fmt: skip
    if not quick:
        out.append(Case("window 1024 at 4096", 4096, 4096, mask="j <= i and i - j < 1024", dense_mask=_window(1024),
                        visible=0.22))  # fmt: skip
        out.append(Case("dense 1024, D128", 1024, 1024, d=128))
    out += [
        Case("neighbourhood 7x7 of 32x32", 1024, 1024, visible=0.05, dense_mask=_neighbours,
             mask="-3 <= i // 32 - j // 32 and i // 32 - j // 32 <= 3 and -3 <= i % 32 - j % 32 and "
             "i % 32 - j % 32 <= 3"),
        Case("cross 1024 x 77", 1024, 77, b=2),
        Case("swin 7x7 windows", 49, 49, d=32, b=64, heads=4),
        Case("vit 197", 197, 197, b=4, heads=12),
        Case("bert 32", 32, 32, b=8, heads=12),
        Case("bert 128", 128, 128, b=8, heads=12),
    ]  # fmt: skip
    out += [Case(f"decode {m}", 1, m, d=128, groups=4) for m in ([4096] if quick else [1024, 16384, 65536])]
    return out


class _Run:
    """One case in one dtype: every formulation as a closure, made and checked before anything is timed."""

    def __init__(self, case: Case, dtype: str, *, flex: bool, inductor: bool) -> None:
        self.case, kind = case, _DTYPES[dtype]
        random = torch.Generator().manual_seed(0)
        torch.manual_seed(0)

        def normal(heads: int, rows: int) -> torch.Tensor:
            return torch.randn(case.b, heads, rows, case.d, generator=random).to(kind)

        heads = case.heads * case.groups
        self.q, self.k, self.v = normal(heads, case.n), normal(case.heads, case.m), normal(case.heads, case.m)
        self.more = {name.partition(":")[0]: make(case, kind) for name, make in case.tensors.items()}
        mask = case.dense_mask(case, self.more) if case.dense_mask else None
        self.mask = mask if mask is None or mask.dtype == torch.bool else mask.to(kind)
        self.out = torch.empty(case.b, case.heads, case.groups, case.n, case.d, dtype=kind)
        found = built(print_attention(parse_attention(case.text(dtype))), "cpu")
        if found.language != "cpp":
            raise RuntimeError(f"no C++ kernel: {found.reason}")
        tensors, sizes = (self.q, self.k, self.v, *self.more.values()), (case.b, case.n, case.m)
        self.run: dict[str, Callable[[], object]] = {"attncc": lambda: found.kernel(tensors, sizes, (self.out,))}
        if not case.capped:
            self.run["sdpa"] = self._sdpa
        if inductor:
            self.run["inductor"] = self._inductor()
        if flex and (made := self._flex()) is not None:
            self.run["flex"] = made
        self.error = self._check()

    def _sdpa(self) -> torch.Tensor:
        c = self.case
        if c.groups > 1 and c.n == 1:  # queries of a group folded onto their keys: several times enable_gqa's speed
            folded = self.q.reshape(c.b, c.heads, c.groups, c.d)
            return sdpa(folded, self.k, self.v, attn_mask=self.mask).reshape(self.q.shape)
        return sdpa(self.q, self.k, self.v, attn_mask=self.mask, is_causal=c.causal, enable_gqa=c.groups > 1)

    def _eager(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        c = self.case
        s = q @ k.repeat_interleave(c.groups, 1).transpose(-1, -2) * c.d**-0.5
        if c.capped:
            s = torch.tanh(s / c.capped) * c.capped
        if c.causal:
            s = s.masked_fill(torch.ones(c.n, c.m, dtype=torch.bool).triu(1), -torch.inf)
        elif self.mask is not None:
            s = s.masked_fill(~self.mask, -torch.inf) if self.mask.dtype == torch.bool else s + self.mask
        return torch.softmax(s, -1) @ v.repeat_interleave(c.groups, 1)

    def _inductor(self) -> Callable[[], object]:
        compiled = torch.compile(self._eager, dynamic=False)
        return lambda: compiled(self.q, self.k, self.v)

    def _flex(self) -> Callable[[], object] | None:
        from torch.nn.attention.flex_attention import (  # noqa: PLC0415 loads Inductor
            create_block_mask,
            flex_attention,
        )

        c = self.case
        if c.groups > 1 or (c.dense_mask is not None and not c.name.startswith("window")):
            return None
        width = int(c.name.split()[1]) if c.dense_mask is not None else c.n
        block = None
        if c.causal or c.dense_mask is not None:
            block = create_block_mask(
                lambda _b, _h, i, j: (j <= i) & (i - j < width), None, None, c.n, c.m, device="cpu"
            )  # fmt: skip
        compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)
        return lambda: compiled(self.q, self.k, self.v, block_mask=block)

    def _check(self) -> float:
        """Largest difference from the eager expression, before any timing."""
        self.run["attncc"]()
        with torch.no_grad():
            want = self._eager(*(x.float() for x in (self.q, self.k, self.v)))
        error = (self.out.reshape(want.shape).float() - want).abs().max().item()
        if not error < 0.1:
            raise RuntimeError(f"{self.case.name}: attncc differs from eager by {error}")
        return error

    def medians(self, budget: float) -> dict[str, float]:
        """Seconds of each formulation; `budget` seconds in all, at least three rounds after one that warms up."""
        for f in self.run.values():
            f()
        times: dict[str, list[float]] = {name: [] for name in self.run}
        start = time.perf_counter()
        while time.perf_counter() - start < budget or len(times["attncc"]) < 3:
            for name, f in self.run.items():
                before = time.perf_counter()
                f()
                times[name].append(time.perf_counter() - before)
            if len(times["attncc"]) >= 200:
                break
        return {name: statistics.median(t) for name, t in times.items()}


def _matmul_rate(dtype: torch.dtype) -> float:
    """GF/s of a square product: what the machine's library reaches."""
    a = torch.randn(2048, 2048).to(dtype)
    torch.mm(a, a)
    best = min(_timed(lambda: torch.mm(a, a)) for _ in range(5))
    return 2 * 2048**3 / best / 1e9


def _timed(f: Callable[[], object]) -> float:
    before = time.perf_counter()
    f()
    return time.perf_counter() - before


@contextmanager
def _threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(threads: int | None = None, quick: bool = False, json: Path | None = None) -> dict[str, Any]:
    """Runs the suite (with 1 and 2 threads unless told), prints a table, writes JSON, returns what it wrote."""
    counts = [threads] if threads else [1] if quick else [1, 2]
    report: dict[str, Any] = {
        "torch": torch.__version__, "machine": platform.processor() or platform.machine(), "isa": detect_isa(),
        "rows": [],
    }  # fmt: skip
    print(f"torch {report['torch']}, {report['isa']}; milliseconds (medians), ratios to attncc")
    for count in counts:
        with _threads(count), torch.no_grad():
            rates = {name: _matmul_rate(kind) for name, kind in _DTYPES.items()}
            report[f"mm GF/s, {count} threads"] = rates
            print(f"{count} thread(s): torch.mm " + ", ".join(f"{n} {r:.0f} GF/s" for n, r in rates.items()))
            for dtype in _DTYPES:
                for case in cases(quick=quick):
                    row = _row(case, dtype, count, quick=quick)
                    report["rows"].append(row)
                    print(_line(row), flush=True)
    if json is not None:
        _write(json, report)
    return report


def _row(case: Case, dtype: str, threads: int, *, quick: bool) -> dict[str, Any]:
    first = threads == 1 and not quick
    flex = first and case.name in ("dense 1024", "causal 1024", "window 256 at 4096")
    inductor = first and case.n * case.m <= 1024 * 1024
    work = _Run(case, dtype, flex=flex, inductor=inductor)
    medians = work.medians(0.5 if quick else 1.0)
    ours = medians["attncc"]
    flops = 4 * case.b * case.heads * case.groups * case.n * case.m * case.d * case.visible
    size = torch.finfo(_DTYPES[dtype]).bits // 8
    return {
        "case": case.name, "dtype": dtype, "threads": threads, "error": work.error,
        "ms": {name: t * 1e3 for name, t in medians.items()},
        "ratio": {name: t / ours for name, t in medians.items() if name != "attncc"},
        "gflops": flops / ours / 1e9, "gb_per_s": 2 * case.b * case.heads * case.m * case.d * size / ours / 1e9,
    }  # fmt: skip


def _line(row: dict[str, Any]) -> str:
    speed = f"{row['gb_per_s']:6.1f} GB/s" if row["case"].startswith("decode") else f"{row['gflops']:6.0f} GF/s"
    ratios = "  ".join(f"{name} {r:.2f}x" for name, r in row["ratio"].items())
    return f"{row['case']:28s} {row['dtype']:5s}{row['ms']['attncc']:9.3f} ms {speed}   {ratios}"


def _write(path: Path, report: dict[str, Any]) -> None:
    path.write_text(json_format.dumps(report, indent=1) + "\n", encoding="utf-8")
