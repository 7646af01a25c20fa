"""`attncc bench --suite linear`: linear attention by chunks, as models write it and as one kernel.

Each row is a module of `linear_models`, compiled by Inductor alone and with attncc, and beside them the kernel alone
against the exact form by chunks in eager torch, at the chunk that is fastest there. Then forward and backward of two
of them, the kernel at several lengths, and one token a sequence, whose time is that of reading and writing the states.
One thread; calls take turns, and what counts is the median of the processor time of this thread. Errors are against
float64, as multiples of the model's own.
"""

from __future__ import annotations

import json as json_format
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from attncc.bench import linear_models
from attncc.bench.chosen import chosen
from attncc.ir import Linear, parse_linear
from attncc.ir.linear_chunks import by_chunks
from attncc.kernels.linear import built_linear
from attncc.runtime.linear_op import allocate

HEADS, WIDTH, TOKENS, FEW = 8, 64, 2048, 512
LENGTHS = 1024, 2048, 4096, 8192, 16384
CHUNKS = 32, 64  # 128 was never the best
ROUNDS = 5
TRAINED = 1024
TRAINING = "gated delta", "ssd"
SEQUENCES = 1, 8, 64, 256
ROWS: dict[str, Callable[..., Any]] = {
    f.__name__.replace("_", " "): f
    for f in (linear_models.gated_delta, linear_models.delta_by_inverse, linear_models.ssd,
              linear_models.gated_by_channel)
}  # fmt: skip


class _Layer(nn.Module):
    """What stands around the chunks of a layer: activations of projections, decays below one."""

    def __init__(self, core: Callable[..., Any]) -> None:
        super().__init__()
        self.core = core

    def forward(self, q: Any, k: Any, v: Any, g: Any, beta: Any) -> Any:
        q, k, g = F.silu(q), F.normalize(k, dim=-1), -F.softplus(g)
        if self.core is linear_models.gated_by_channel:
            return self.core(q, k, v, g[..., None] * torch.linspace(0.1, 1, q.shape[-1]))
        return self.core(q, k, v, g, beta.sigmoid())


def run(*, quick: bool = False, json: Path | None = None, only: str = "") -> None:
    """Print the tables; `only` as in `chosen`."""
    names = chosen([*ROWS, "training", "lengths", "decode"], only)
    torch.set_num_threads(1)
    results: list[dict[str, object]] = []
    tokens = FEW if quick else TOKENS
    for name in names:
        if name == "lengths":
            results += _lengths(LENGTHS[:3] if quick else LENGTHS)
        elif name == "decode":
            results += _decode()
        elif name == "training":
            results += [_training(x, ROWS[x], FEW if quick else TRAINED) for x in TRAINING]
        else:
            results.append(_model(name, ROWS[name], tokens))
    if json is not None:
        json.write_text(json_format.dumps(results, indent=1))


def _turns(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Milliseconds of a call of each."""
    found: list[list[float]] = [[] for _ in calls]
    for round in range(ROUNDS + 1):
        for call, times in zip(calls, found, strict=True):
            start = time.thread_time()
            call()
            if round:
                times.append((time.thread_time() - start) * 1e3)
    return [median(x) for x in found]


def _inputs(tokens: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, tokens, HEADS, WIDTH)] * 3 + [(1, tokens, HEADS)] * 2
    return [torch.randn(s, generator=generator).to(dtype) for s in shapes]


def _model(name: str, core: Callable[..., Any], tokens: int) -> dict[str, object]:
    model, given = _Layer(core), _inputs(tokens)
    with torch.no_grad():
        exact = model(*_inputs(tokens, torch.float64))[0]
        start = time.perf_counter()
        ours = torch.compile(model, backend="attncc")
        got = ours(*given)[0]
        compiled = time.perf_counter() - start
        start = time.perf_counter()
        own = torch.compile(model)
        plain = own(*given)[0]
        unfused = time.perf_counter() - start
        mine, theirs = _turns([lambda: ours(*given), lambda: own(*given)])
    error = float((got - exact).abs().max() / (plain - exact).abs().max())
    print(f"{name:18} {tokens:6} tokens  attncc {mine:9.3f} ms  Inductor {theirs:9.3f} ms  {theirs / mine:6.2f}x  "
          f"error {error:5.2f} of Inductor's  compiled in {compiled:.0f} s and {unfused:.0f} s")  # fmt: skip
    return {"row": name, "tokens": tokens, "attncc_ms": mine, "inductor_ms": theirs, "error": error}


def _training(name: str, core: Callable[..., Any], tokens: int) -> dict[str, object]:
    """Forward and backward of a layer, as compiled by each; its loss is a sum with random weights."""
    model = _Layer(core)
    seed = torch.randn(1, tokens, HEADS, WIDTH, generator=torch.Generator().manual_seed(1))

    def gradients(run: Callable[..., Any], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        given = [x.requires_grad_() for x in _inputs(tokens, dtype)]
        return list(torch.autograd.grad((run(*given)[0] * seed.to(dtype)).sum(), given))

    exact, plain = gradients(model, torch.float64), gradients(model)
    own, ours = torch.compile(model), torch.compile(model, backend="attncc")
    start = time.perf_counter()
    gradients(own)
    unfused = time.perf_counter() - start
    start = time.perf_counter()
    got = gradients(ours)
    compiled = time.perf_counter() - start
    mine, theirs = _turns([lambda: gradients(ours), lambda: gradients(own)])
    off = (float((x - z).abs().max() / (y - z).abs().max()) for x, y, z in zip(got, plain, exact, strict=True))
    error = max(off)
    print(f"{name:18} {tokens:6} tokens, forward and backward  attncc {mine:9.3f} ms  Inductor {theirs:9.3f} ms  "
          f"{theirs / mine:6.2f}x  gradients {error:5.2f} of eager's error at most  compiled in {compiled:.0f} s and "
          f"{unfused:.0f} s")  # fmt: skip
    return {"row": f"training {name}", "tokens": tokens, "attncc_ms": mine, "inductor_ms": theirs, "error": error}


def _delta(tokens: int, batch: int = 1) -> tuple[Linear, str, dict[str, torch.Tensor]]:
    """The gated delta rule, its text, and tensors for it."""
    wide, few = f"f32[{batch}, {HEADS}, {tokens}, {WIDTH}]", f"f32[{batch}, {HEADS}, {tokens}]"
    text = "\n".join([
        "linear", f"batch  b = {batch}, h = {HEADS}", f"axis   i = {tokens}, j = {tokens}, d = {WIDTH}, e = {WIDTH}",
        f"tensor q: {wide}", f"tensor k: {wide}", f"tensor v: {wide}", f"tensor g: {few}", f"tensor r: {few}",
        f"tensor s0: f32[{batch}, {HEADS}, {WIDTH}, {WIDTH}]", "q      q[b, h, i, d]", "k      k[b, h, j, d]",
        "v      v[b, h, j, e]", "state  s0[b, h, d, e]", "phi_q  x", "phi_k  x", "decay  exp(g[b, h, j])",
        "rate   r[b, h, j]", "rule   delta", "sees   past", "give   out, state", "dtype  f32",
    ]) + "\n"  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    made = {x: torch.randn(batch, HEADS, tokens, WIDTH, generator=generator) for x in "qkv"}
    made["k"] = torch.nn.functional.normalize(made["k"], dim=-1)
    made |= {x: torch.rand(batch, HEADS, tokens, generator=generator) for x in "gr"}
    made["g"] = -made["g"] * 0.2
    made["s0"] = torch.randn(batch, HEADS, WIDTH, WIDTH, generator=generator)
    return parse_linear(text), text, made


def _kernel(spec: str, given: dict[str, torch.Tensor]) -> Callable[[], object]:
    tensors = list(given.values())
    kernel, outputs = built_linear(spec, "cpu").kernel, allocate(spec, tensors, [])
    return lambda: kernel(tensors, [], outputs)


def _lengths(lengths: Sequence[int]) -> list[dict[str, object]]:
    results: list[dict[str, object]] = []
    for tokens in lengths:
        a, spec, given = _delta(tokens)
        calls = [_kernel(spec, given), *(partial(by_chunks, a, given, chunk=c) for c in CHUNKS)]
        with torch.no_grad():
            mine, *chunks = _turns(calls)
        print(f"gated delta kernel {tokens:6} tokens  {mine:9.3f} ms  {mine / tokens * 1e3:6.3f} us a token  "
              f"{min(chunks) / mine:6.2f}x the best chunks of eager torch")  # fmt: skip
        results.append({"row": "lengths", "tokens": tokens, "attncc_ms": mine, "chunks_ms": min(chunks)})
    return results


def _decode() -> list[dict[str, object]]:
    """One token of some sequences: their states are read and written once, as much as a copy does."""
    results: list[dict[str, object]] = []
    for batch in SEQUENCES:
        _, spec, given = _delta(1, batch=batch)
        target, kernel = torch.empty_like(given["s0"]), _kernel(spec, given)
        times = range(4096 // batch)  # a clock that counts in milliseconds would not see one call of few sequences

        def steps(kernel: Callable[[], object] = kernel, times: range = times) -> None:
            for _ in times:
                kernel()

        def copies(to: Any = target, of: Any = given["s0"], times: range = times) -> None:
            for _ in times:
                to.copy_(of)

        mine, copy = (x / len(times) for x in _turns([steps, copies]))
        print(f"one token of {batch:4} sequences: {mine * 1e3:9.1f} us, "
              f"{copy / mine:.2f} of the speed of copying their states")  # fmt: skip
        results.append({"row": "decode", "sequences": batch, "attncc_ms": mine, "copy_ms": copy})
    return results
