"""`attncc bench --suite gpu`: attncc's Triton kernels against SDPA, FlexAttention and the unfused graph, in one run.

Every rival computes the same attention on the same tensors. A rival that cannot (a backend without masks, a score
matrix that does not fit) is left out of the row, with its reason in the JSON.
"""

from __future__ import annotations

import datetime
import json as json_module
import math
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from attncc.bench.gpu_rows import rows
from attncc.bench.row import Row, grid, mask_of, visible_pairs
from attncc.frontends.targets import TargetError
from attncc.ir import parse_attention, print_attention
from attncc.kernels.build import built
from attncc.runtime.measure import on_cuda

Call = Callable[[], torch.Tensor]

_LARGEST_SCORES = 8 << 30  # bytes of a float32 score matrix the unfused graph may make


def ours(row: Row, t: dict[str, torch.Tensor]) -> Call:
    a = parse_attention(row.text)
    run = built(print_attention(a), t["q"].device.type).kernel
    shape = (row.batch, row.heads, row.group, row.rows, row.d)
    out = torch.empty(shape, device=t["q"].device, dtype=torch.bfloat16)
    tensors = [t[x.name] for x in a.tensors]

    def call() -> torch.Tensor:
        run(tensors, [], [out])
        return out.view(row.batch, row.heads * row.group, row.rows, row.d)

    return call


def sdpa(row: Row, t: dict[str, torch.Tensor], backend: SDPBackend) -> Call:
    if row.score_mod is not None:
        raise ValueError("SDPA has no score function")
    mask = None if row.causal else mask_of(row, t)
    if mask is not None and backend is SDPBackend.FLASH_ATTENTION:
        raise ValueError("the flash backend takes no mask")

    def call() -> torch.Tensor:
        with sdpa_kernel([backend]):
            return scaled_dot_product_attention(
                t["q"], t["k"], t["v"], attn_mask=mask, is_causal=row.causal, enable_gqa=row.group > 1
            )

    return call


def flex(row: Row, t: dict[str, torch.Tensor]) -> Call:
    from torch.nn.attention import flex_attention as module  # noqa: PLC0415  slow to import

    score_mod = None if row.score_mod is None else row.score_mod(t)
    block_mask = None
    if row.mask_mod is not None:
        sequences = row.batch if "length" in t else None
        heads = row.heads * row.group if row.by_head else None
        block_mask = torch.compile(module.create_block_mask)(
            row.mask_mod(t), sequences, heads, row.rows, row.keys, device=t["q"].device
        )
    compiled: Any = torch.compile(module.flex_attention, dynamic=False)
    return lambda: compiled(t["q"], t["k"], t["v"], score_mod=score_mod, block_mask=block_mask,
                            enable_gqa=row.group > 1)  # fmt: skip


def unfused(row: Row, t: dict[str, torch.Tensor]) -> Call:
    """Scores, mask, softmax, product, as a model spells them, compiled by Inductor."""
    if 4 * row.batch * row.heads * row.group * row.rows * row.keys > _LARGEST_SCORES:
        raise ValueError("the score matrix does not fit")
    mask = mask_of(row, t)
    score_mod = None if row.score_mod is None else row.score_mod(t)
    _, h, i, j = grid(row, t["q"].device)

    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = k.repeat_interleave(row.group, 1), v.repeat_interleave(row.group, 1)
        s = (q @ k.transpose(-1, -2)).float() * row.d**-0.5
        s = s if score_mod is None else score_mod(s, 0, h, i, j)
        s = s if mask is None else s.masked_fill(~mask, -math.inf)
        return torch.softmax(s, -1).to(q.dtype) @ v

    compiled = torch.compile(model, dynamic=False)
    return lambda: compiled(t["q"], t["k"], t["v"])


RIVALS: dict[str, Callable[[Row, dict[str, torch.Tensor]], Call]] = {
    "attncc": ours,
    "flash": lambda row, t: sdpa(row, t, SDPBackend.FLASH_ATTENTION),
    "cudnn": lambda row, t: sdpa(row, t, SDPBackend.CUDNN_ATTENTION),
    "efficient": lambda row, t: sdpa(row, t, SDPBackend.EFFICIENT_ATTENTION),
    "flex": flex,
    "unfused": unfused,
}


def matmul_ceiling(device: torch.device) -> float:
    """Floating point operations a second of a large bfloat16 product."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    on_cuda(lambda: a @ b, 5)
    return 2 * 8192**3 / min(on_cuda(lambda: a @ b, 5) for _ in range(5))


def measure_row(row: Row, device: torch.device, ceiling: float, rounds: int) -> dict[str, Any]:
    """One row: microseconds of each rival, the error of ours, ratios. Rivals take turns."""
    t = row.tensors(device)
    calls: dict[str, Call] = {}
    absent: dict[str, str] = {}
    results: dict[str, torch.Tensor] = {}
    for name, make in RIVALS.items():
        try:
            call = make(row, t)
            results[name] = call().float()
            calls[name] = call
        except Exception as error:
            absent[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if "attncc" not in calls:
        raise RuntimeError(f"{row.name}: {absent['attncc']}")
    others = [r for n, r in results.items() if n != "attncc"]
    error = float((results["attncc"] - others[-1]).abs().max()) if others else None
    repeats = {n: max(1, min(50, round(0.02 / max(on_cuda(c, 1), 1e-6)))) for n, c in calls.items()}
    samples: dict[str, list[float]] = {n: [] for n in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(on_cuda(call, repeats[name]))
    us = {n: statistics.median(x) * 1e6 for n, x in samples.items()}
    operations = 4 * row.d * visible_pairs(row, t)
    return {
        "name": row.name, "text": row.text, "us": us, "absent": absent, "difference": error,
        "ratio": {n: x / us["attncc"] for n, x in us.items() if n != "attncc"},
        "tflops": operations / us["attncc"] / 1e6, "of_matmul": operations / (us["attncc"] * 1e-6) / ceiling,
        "gigabytes_a_second": _bytes(row, t) / us["attncc"] / 1e3,
    }  # fmt: skip


def _bytes(row: Row, t: dict[str, torch.Tensor]) -> int:
    """Bytes of keys and values a decode step must read."""
    keys = int(t["length"].sum()) if "length" in t else row.batch * row.keys
    return 4 * row.heads * row.d * keys


def run(quick: bool = False, json: Path | None = None) -> dict[str, Any]:
    """Measure, print a table, and write it as JSON. Raises TargetError on a machine without a GPU."""
    if not torch.cuda.is_available():
        raise TargetError("the gpu suite needs a GPU that torch can use; this machine has none (try --suite cpu)")
    device = torch.device("cuda", torch.cuda.current_device())
    with _exact_products():
        ceiling = matmul_ceiling(device)
        result: dict[str, Any] = {"device": torch.cuda.get_device_name(device), "versions": _versions(),
                                  "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                                  "matmul_tflops": ceiling / 1e12, "rows": []}  # fmt: skip
        print(f"{result['device']}, {result['versions']}, matmul {ceiling / 1e12:.0f} TFLOP/s")
        names = [n for n in RIVALS if n != "attncc"]
        print(f"{'':44}{'us':>10}{'of matmul':>11}" + "".join(f"{n:>11}" for n in names))
        for row in rows(quick=quick):
            torch.compiler.reset()
            try:
                done: dict[str, Any] = measure_row(row, device, ceiling, 3 if quick else 7)
            except (RuntimeError, torch.OutOfMemoryError) as error:
                done = {"name": row.name, "failed": str(error)}
                print(f"{row.name:44} {error}", file=sys.stderr)
            result["rows"].append(done)
            if "us" in done:
                ratios = "".join(f"{done['ratio'][n]:10.2f}x" if n in done["ratio"] else f"{'-':>11}" for n in names)
                print(f"{row.name:44}{done['us']['attncc']:10.1f}{done['of_matmul']:10.0%} {ratios}", flush=True)
            torch.cuda.empty_cache()
    if json is not None:
        json.write_text(json_module.dumps(result, indent=1), encoding="utf-8")
    return result


@contextmanager
def _exact_products() -> Iterator[None]:
    """float32 products as torch's defaults have them, whatever was set before."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "attncc"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
