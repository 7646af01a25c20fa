"""`attncc bench --suite models`: whole models in inference, attncc beside eager and Inductor.

A row takes processes of its own, with caches of their own: the first call of each compiler with empty caches, then with
full ones, and each time what memory a later call needs beyond the model; and one process in which all three take turns,
which gives the times of a call. Ratios are medians of the ratios within a turn, and the outputs of the compiled models
are compared with eager's in float64 before they are timed. The JSON names the processor, its instruction set and torch;
what was measured elsewhere is not mixed in.
"""

from __future__ import annotations

import copy
import ctypes
import datetime
import json as json_module
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from attncc.bench.chosen import chosen
from attncc.bench.cpu import keep, report_of, samples_of, write
from attncc.bench.model_report import line, markdown, plot
from attncc.bench.model_rows import Made, rows
from attncc.frontends.targets import TargetError
from attncc.ir.evaluate import DTYPE_OF

DTYPES = ("f32", "bf16")
BACKENDS = ("eager", "inductor", "attncc")
#: How far an output may be from eager's in float64, against the largest: what this many layers of rounding leave.
_MOST = {"f32": 2e-3, "bf16": 0.25}


def run(
    quick: bool = False, json: Path | None = None, *, only: str = "", dtypes: Sequence[str] = (),
    threads: Sequence[int] = (), picture: Path | None = None, table: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measures (every model in f32 with two threads unless told; `quick`: two layers of each), prints, writes, returns
    the report. A row that `json` already holds is measured anew.

    Raises TargetError where `json` is of another machine, or of other sizes."""
    unknown = [x for x in dtypes if x not in DTYPES]
    if unknown:
        raise TargetError(f"bench: no dtype {', '.join(unknown)}; there are {', '.join(DTYPES)}")
    every = {x.name: x for x in rows()}
    names, report = chosen(every, only), report_of(json)
    if any(r["quick"] != quick for r in report["rows"]):
        raise TargetError(f"bench: {json} holds models of other sizes; --quick makes two layers of each")
    for count in threads or [2]:
        for dtype in dtypes or DTYPES[:1]:
            for name in names:
                done = _row(name, dtype, count, quick=quick) | {"least": every[name].least.get(dtype)}
                print(line(done), flush=True)
                keep(report, done)
                write(json, json_module.dumps(report, indent=1) + "\n")
    write(picture, lambda: plot(report))
    write(table, lambda: markdown(report))
    return report


def _row(name: str, dtype: str, threads: int, *, quick: bool) -> dict[str, Any]:
    """What all processes of a row measured; `failed` with the last line of one that failed."""
    done: dict[str, Any] = {"row": name, "dtype": dtype, "threads": threads, "quick": quick}
    done["when"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    size = "quick" if quick else "full"
    with tempfile.TemporaryDirectory(prefix="attncc-bench-") as folder:
        for state in ("cold", "warm"):
            for backend in BACKENDS:
                if (state, backend) == ("warm", "eager"):
                    continue
                found = _process(folder, name, dtype, threads, size, backend)
                if "failed" in found:
                    return done | {"failed": f"{backend}, {state}: {found['failed']}"}
                done.setdefault(f"{state} first call", {})[backend] = found["first call"]
                done.setdefault("memory", {})[backend] = found["memory"]
                if "sites" in found:
                    done["sites"] = found["sites"]
        return done | _process(folder, name, dtype, threads, size, "turns")


def _process(folder: str, name: str, dtype: str, threads: int, size: str, what: str) -> dict[str, Any]:
    """What a new process measures, with caches in `folder`."""
    caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "ATTNCC_CACHE_DIR": f"{folder}/attncc",
              "OMP_NUM_THREADS": str(threads)}  # fmt: skip
    command = [sys.executable, "-m", "attncc.bench.models", name, dtype, size, what]
    done = subprocess.run(command, env={**os.environ, **caches}, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no word"])[-1][:200]}
    return json_module.loads(done.stdout.splitlines()[-1])


def made(name: str, dtype: str, size: str) -> Made:
    """The model of a row and its inputs, the same numbers in every process."""
    torch.manual_seed(0)
    row = next(x for x in rows() if x.name == name)
    x = row.make(size == "quick", DTYPE_OF[dtype])
    x.model.eval().to(DTYPE_OF[dtype])
    return x


def called(x: Made, backend: str) -> Callable[[], Any]:
    """A call of the model as `backend` runs it."""
    model: Any = x.model if backend == "eager" else torch.compile(x.model, backend=backend, dynamic=False)

    def call() -> Any:
        x.before(x.kwargs)
        return model(*x.args, **x.kwargs)

    return call


def alone(name: str, dtype: str, size: str, backend: str) -> dict[str, Any]:
    """Seconds of the first call by the clock, and how far the process grew in a later one, in MB."""
    from attncc.driver.recording import record  # noqa: PLC0415  eager does not need the driver

    x = made(name, dtype, size)
    found: dict[str, Any] = {}
    with torch.no_grad():
        call = called(x, backend)
        start = time.perf_counter()
        if backend == "attncc":
            with record() as report:
                call()
            found["sites"] = [sum(site.status == "fused" for site in report.sites), len(report.sites)]
        else:
            call()
        found["first call"] = time.perf_counter() - start
        call()
        found["memory"] = _growth(call)
    return found


def _growth(call: Callable[[], Any]) -> float | None:
    """MB by which the process's peak in a call lies above what it held before; None where Linux does not tell."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what compiling left free would hide what the call takes
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
        before = _status("VmRSS")
        call()
        return (_status("VmHWM") - before) / 1024
    except (OSError, AttributeError):
        return None


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(key + ":"))


def turns(name: str, dtype: str, size: str) -> dict[str, Any]:
    """Milliseconds of a call of each, ratios to attncc's, and how far outputs are from eager's in float64."""
    x = made(name, dtype, size)
    with torch.no_grad():
        exact = _floats(called(_wider(x), "eager")())
        calls = {backend: called(x, backend) for backend in BACKENDS}
        error = {n: _apart(_floats(call()), exact) for n, call in calls.items()}
        if not error["attncc"] <= max(_MOST[dtype], 2 * error["eager"]):
            raise RuntimeError(f"{name} in {dtype}: the outputs are off by {error['attncc']:.2g}")
        for call in calls.values():
            call()
        samples = samples_of(dict(calls), {}, 2.0 if size == "quick" else 20.0, set(calls))
    own = samples["attncc"]
    quarters = {n: statistics.quantiles(s, n=4) for n, s in samples.items() if len(s) > 2}
    return {
        "ms": {n: statistics.median(s) * 1e3 for n, s in samples.items()}, "error": error, "rounds": len(own),
        "spread": {n: (high - low) / middle for n, (low, middle, high) in quarters.items()},
        "ratio": {n: statistics.median(y / z for y, z in zip(s, own, strict=False))
                  for n, s in samples.items() if n != "attncc"},
    }  # fmt: skip


def _wider(x: Made) -> Made:
    """The same in float64, of its own: a cache that the call writes to is a copy."""
    model, args, kwargs, before = copy.deepcopy((x.model, x.args, x.kwargs, x.before))
    for layer in getattr(kwargs.get("past_key_values"), "layers", ()):
        layer.keys, layer.values = layer.keys.double(), layer.values.double()
    wide = pytree.tree_map(lambda t: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t, args)
    return Made(model.double(), wide, kwargs, before)


def _floats(out: Any) -> list[torch.Tensor]:
    """The floating tensors of a model's output, without the cache that it hands back."""
    values = out.values() if isinstance(out, dict) else out if isinstance(out, tuple) else [out]
    return [t.double().clone() for t in values if isinstance(t, torch.Tensor) and t.is_floating_point()]


def _apart(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    return max(float((g - w).abs().max() / w.abs().max().clamp_min(1e-30)) for g, w in zip(got, want, strict=True))


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    _name, _dtype, _size, _what = sys.argv[1:]
    print(json_module.dumps(turns(_name, _dtype, _size) if _what == "turns" else alone(_name, _dtype, _size, _what)))
