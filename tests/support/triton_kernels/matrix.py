"""Compiling kernels for GPUs that are not here, and reading what came out. Jobs run in processes of their own."""

from __future__ import annotations

import os
import re
import warnings
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from tempfile import TemporaryDirectory
from typing import NamedTuple

from attncc.codegen.triton import TritonConfig, configs, emit, emit_gradient, gradient_configs
from attncc.ir import Attention, parse_attention, verify
from attncc.passes.bounds.bounds import loop_bounds
from attncc.passes.gradient import gradient_of
from attncc.runtime.triton_compile import Compiled, compile_for
from triton_kernels.cases import CASES, text

#: Shared memory a block may use.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
#: A few values spilled around the loops (never in them) cost nothing that can be measured.
SPILL_BYTES = 256


class Job(NamedTuple):
    case: str
    d: int
    dtype: str
    target: str
    kernel: str = "attention"
    at: int = 0
    tf32: bool = False
    descriptors: bool = False
    lists: bool = False
    persistent: bool = False

    @property
    def backward(self) -> bool:
        return self.kernel.startswith("gradient") or self.kernel in ("look_rows", "look_keys")


@dataclass(frozen=True)
class Built:
    compiled: Compiled
    config: TritonConfig
    loops: list[Loop]


@dataclass(frozen=True)
class Loop:
    """A loop with matrix products in it."""

    instructions: int
    products: int
    local: int


def attention(job: Job) -> Attention:
    case = CASES[job.case]
    e = job.d if not case.e else case.e
    wide = replace(case, d=job.d, e=e, groups=4 if case.groups > 1 else 1, heads=8, keys=case.keys)
    lines = text(wide, job.dtype).splitlines()
    if case.rows == 1:
        lines = [x if x.startswith("size") else x.replace("i = N", "i = 1").replace(", N, ", ", 1, ") for x in lines]
    return verify(parse_attention("\n".join(lines)))


def build(job: Job) -> Built:
    """Compile one kernel. Raises what Triton raises."""
    warnings.simplefilter("ignore")
    a = attention(job)
    if job.backward:
        return _build_backward(replace(a, outputs=("out", "lse")), job)
    bounds = loop_bounds(a, rows=True)
    space = configs(a, bounds, job.target, tf32=job.tf32, lists=job.lists)
    wanted = (job.descriptors, job.persistent)
    config = [c for c in space if (c.descriptors, c.persistent > 0) == wanted][job.at]
    source = emit(a, bounds, config)
    known = {"PARTIAL": job.case.startswith("decode"), "TMA": True, "EVEN": True}
    constants = {n: x for n, x in known.items() if f"{n}: tl.constexpr" in source and job.kernel == "attention"}
    compiled = compile_for(source, config, job.target, job.kernel, **constants)
    return Built(compiled, config, loops(compiled.machine_code))


def _build_backward(a: Attention, job: Job) -> Built:
    g = gradient_of(a, [t.name for t in a.tensors if t.kind == "float"])
    assert not isinstance(g, str), g
    pair = gradient_configs(g, job.target, tf32=job.tf32, lists=job.lists)[job.at]
    source = emit_gradient(g, loop_bounds(a, rows=True), loop_bounds(g.by_key, rows=True), *pair)
    config = pair[job.kernel.endswith("keys")]
    compiled = compile_for(source, config, job.target, job.kernel, BLOCK_M=config.block_m, BLOCK_N=config.block_n)
    return Built(compiled, config, loops(compiled.machine_code))


_LABEL = re.compile(r"^(\.L_x_\d+|\.LBB\d+_\d+):")
_BACK = re.compile(r"(?:\bBRA\b|\bs_c?branch\w*)[^;]*?(\.L_x_\d+|\.LBB\d+_\d+)")
_PRODUCT = re.compile(r"\b(HMMA|HGMMA|FFMA|UTC\w*MMA|v_mfma_\w+)\b")
_LOCAL = re.compile(r"\b(LDL|STL|scratch_load\w*|scratch_store\w*)\b")


def loops(code: str) -> list[Loop]:
    """Innermost loops that hold at least four matrix products. A branch back from behind the program's end is not a
    loop: it is the way back from a wait that was moved out of line."""
    lines = code.splitlines()
    labels: dict[str, int] = {}
    found: list[tuple[int, int, Loop]] = []
    for at, line in enumerate(lines):
        if label := _LABEL.match(line.strip()):
            labels[label[1]] = at
        if (back := _BACK.search(line)) and back[1] in labels:
            body = lines[labels[back[1]] : at]
            products = sum(bool(_PRODUCT.search(x)) for x in body)
            if products >= 4 and not any(re.search(r"\bEXIT\b", x) for x in body):
                local = sum(bool(_LOCAL.search(x)) for x in body)
                found.append((labels[back[1]], at, Loop(len(body), products, local)))
    inner = [x for x in found if not any(x[0] < y[0] and y[1] < x[1] for y in found)]
    return [loop for _, _, loop in inner]


class Matrix:
    """Jobs started together in two processes; `self[job]` waits for one."""

    def __init__(self, jobs: list[Job]) -> None:
        self._cache = TemporaryDirectory(prefix="attncc-triton-cache-")  # everything is compiled, nothing remembered
        self._pool = ProcessPoolExecutor(
            2, mp_context=get_context("spawn"), initializer=_begin, initargs=(self._cache.name,)
        )
        self._futures: dict[Job, Future[Built]] = {job: self._pool.submit(build, job) for job in jobs}

    def __getitem__(self, job: Job) -> Built:
        return self._futures[job].result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._cache.cleanup()


def _begin(cache: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = cache
