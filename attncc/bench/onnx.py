"""`attncc bench --suite onnx`: one attention with its projections in onnxruntime's CPU provider, by each operator that
could hold it.

Each row is a module as models spell it, written by torch's exporter (opset 18) and then converted: to the standard
operator, to each of onnxruntime's own that takes it, to what `--target onnxruntime` chooses, and with attncc's kernels.
Beside them the file as it is and what onnxruntime's transformers optimizer makes of it. One thread; sessions take
turns, and what counts is the median of the processor time of a call. A ratio above 1 is faster than the file as it is.
"""

from __future__ import annotations

import json as json_format
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from attncc.bench.chosen import chosen
from attncc.codegen.onnx.onnxruntime import CPU
from attncc.convert import onnx_files
from attncc.convert.checking import compare
from attncc.convert.exporting import exported
from attncc.convert.onnx_kernels import KernelLibrary
from attncc.convert.onnx_surgery import Asked
from attncc.frontends.targets import Target, TargetError

HEADS, WIDTH = 8, 64
LENGTHS = 128, 512, 2048
ROUNDS, LEAST_S = 9, 0.05


class _Layer(nn.Module):
    """An attention with its projections; `kv` heads of keys and values."""

    def __init__(self, form: Callable[..., torch.Tensor], kv: int) -> None:
        super().__init__()
        self.form, self.kv = form, kv
        self.q, self.kv_ = nn.Linear(HEADS * WIDTH, HEADS * WIDTH), nn.Linear(HEADS * WIDTH, 2 * kv * WIDTH)
        self.out = nn.Linear(HEADS * WIDTH, HEADS * WIDTH)

    def forward(self, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, HEADS, WIDTH).transpose(1, 2)
        k, v = (t.view(b, n, self.kv, WIDTH).transpose(1, 2) for t in self.kv_(x).chunk(2, -1))
        if self.kv < HEADS:
            k, v = (t.repeat_interleave(HEADS // self.kv, 1) for t in (k, v))
        at = torch.arange(n)
        s = self.form(q @ k.transpose(-1, -2) * WIDTH**-0.5, at[:, None] - at, seen[:, None, None])
        return self.out((s.softmax(-1) @ v).transpose(1, 2).reshape(b, n, HEADS * WIDTH))


def _hidden(s: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    return s.masked_fill(~seen, torch.finfo(s.dtype).min)


Form = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
#: Scores of a form, from scores, the distance to the key, and which keys are none of padding; heads of keys.
ROWS: dict[str, tuple[Form, int]] = {
    "plain": (lambda s, far, seen: s, HEADS),
    "causal": (lambda s, far, seen: _hidden(s, far >= 0), HEADS),
    "padded": (lambda s, far, seen: _hidden(s, seen), HEADS),
    "causal padded": (lambda s, far, seen: _hidden(s, (far >= 0) & seen), HEADS),
    "ALiBi": (lambda s, far, seen: s - 0.1 * far.abs(), HEADS),
    "grouped": (lambda s, far, seen: s, 2),
    "grouped causal": (lambda s, far, seen: _hidden(s, far >= 0), 2),
    "grouped window": (lambda s, far, seen: _hidden(s, (far >= 0) & (far < 128)), 2),
    "grouped padded": (lambda s, far, seen: _hidden(s, seen), 2),
    "capped": (lambda s, far, seen: _hidden(30 * torch.tanh(s / 30), far >= 0), HEADS),
}
OWN = "attncc"


def run(*, quick: bool = False, json: Path | None = None, only: str = "") -> None:
    """Print a line for each row and length; `only` as in `chosen`."""
    names = chosen(ROWS, only)
    torch.set_num_threads(1)
    results: list[dict[str, Any]] = []
    for name in names:
        for n in LENGTHS[:1] if quick else LENGTHS:
            done = _row(name, n)
            results.append(done)
            ratios = "  ".join(f"{x} {ratio:.2f}" for x, ratio in done["ratio"].items())
            took = f"chosen: {done['chosen']}"
            print(f"{name:15} {n:5} tokens  as it is {done['ms']:9.3f} ms", ratios, took, sep="  ", flush=True)
    if json is not None:
        json.write_text(json_format.dumps(results, indent=1))


def _row(name: str, n: int) -> dict[str, Any]:
    torch.manual_seed(0)
    form, kv = ROWS[name]
    batch = 2 if n <= 512 else 1
    seen = torch.arange(n)[None] < torch.tensor([n, 2 * n // 3][:batch])[:, None]
    x = torch.randn(batch, n, HEADS * WIDTH)
    folder, file = onnx_files.export(exported(Target(name, _Layer(form, kv).eval(), (x, seen)), ()), name, opset=18)
    try:
        sessions, took = _sessions(file)
        given = {k: (x, seen)[: len(s.names)] for k, s in sessions.items()}  # what nothing reads may be left out
        wanted = sessions["as it is"](*given["as it is"])
        for label, session in sessions.items():
            compare(wanted, session(*given[label]), f"{name}, {label}")
        ms = _turns([lambda k=k, s=s: s(*given[k]) for k, s in sessions.items()])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    times = dict(zip(sessions, ms, strict=True))
    plain = times.pop("as it is")
    return {"row": name, "tokens": n, "ms": plain, "chosen": took, "ratio": {k: plain / t for k, t in times.items()}}


def _sessions(file: Path) -> tuple[dict[str, onnx_files.Session], str]:
    """(the sessions by name, the operator that the target onnxruntime takes)."""
    found = {"as it is": onnx_files.Session(file)}
    took = "its own nodes"
    optimized = file.parent / "optimized.onnx"
    try:
        from onnxruntime.transformers.optimizer import optimize_model  # noqa: PLC0415 of onnxruntime alone

        optimize_model(str(file), model_type="bert", num_heads=HEADS, hidden_size=HEADS * WIDTH).save_model_to_file(
            str(optimized)
        )
        found["optimizer"] = onnx_files.Session(optimized)
    except (ImportError, TargetError):
        pass
    asked = {"standard": Asked()} | {r.name: Asked("onnxruntime", only=r.name) for r in CPU}
    asked |= {OWN: Asked("onnxruntime", kernels=KernelLibrary())}
    for label, one in asked.items():
        model, _, done = onnx_files.operated(str(file), one)
        if not done.count:
            continue
        path = file.parent / f"{label}.onnx"
        onnx_files.save(model, path)
        if one.kernels is not None:
            one.kernels.write(onnx_files.beside(path))
        found[label] = onnx_files.Session(path)
    _, _, chosen_ = onnx_files.operated(str(file), Asked("onnxruntime"))
    return found, next(iter(chosen_.written), took)


def _turns(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Milliseconds of a call of each."""
    found: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(ROUNDS):
        for call, times in zip(calls, found, strict=True):
            start, count, spent = time.process_time(), 0, 0.0
            while spent < LEAST_S:
                call()
                count, spent = count + 1, time.process_time() - start
            times.append(spent / count * 1e3)
    return [median(x) for x in found]
