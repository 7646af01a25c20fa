"""Kernels for aarch64 on another machine: Debian's cross compiler builds them, qemu's user mode runs them."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch

from attncc.codegen.cpp import emit, emit_gradient
from attncc.ir import Attention, interpret
from attncc.ir.attention_grad import AttentionGrad
from attncc.ir.evaluate import DTYPE_OF
from attncc.passes.bounds.bounds import loop_bounds
from attncc.runtime.cpp import CppToolchain
from cpp_kernels.backward import empty_outputs, given_of, hold
from cpp_kernels.build import compare

CROSS, EMULATOR, ROOT = "aarch64-linux-gnu-g++", "qemu-aarch64", Path("/usr/aarch64-linux-gnu")
_folder = tempfile.TemporaryDirectory(prefix="attncc-emulated-")


@cache
def _tools() -> tuple[CppToolchain, str]:
    """The cross compiler and the emulator; the test is skipped where one is missing."""
    cross = shutil.which(CROSS)
    emulator = shutil.which(EMULATOR) or shutil.which(f"{EMULATOR}-static")
    missing = [what for what, path in (("g++-aarch64-linux-gnu", cross), ("qemu-user", emulator)) if path is None]
    if cross is None or emulator is None:
        pytest.skip(f"kernels for NEON run only with {' and '.join(missing)} installed")
    return CppToolchain(cross), emulator


@cache
def _caller() -> Path:
    out = Path(_folder.name) / "caller"
    source = Path(__file__).with_name("caller.cpp")
    subprocess.run([_tools()[0].path, "-O1", str(source), "-o", str(out), "-ldl"], check=True, capture_output=True)
    return out


@cache
def _kernel(source: str) -> Path:
    out = Path(_folder.name) / f"{abs(hash(source))}.so"
    _tools()[0].compile(source, "neon", out)
    return out


def run_emulated(a: Attention, tensors: Mapping[str, torch.Tensor], sizes: Sequence[int], threads: int = 1
                 ) -> dict[str, torch.Tensor]:  # fmt: skip
    """Outputs by name of the NEON kernel, built with the flags users get. They start as NaN, as in
    `cpp_kernels.build.run`."""
    outputs: dict[str, torch.Tensor] = {}
    for name, like in interpret(a, tensors, sizes).items():
        dtype = DTYPE_OF[a.dtype if name == "out" else a.compute_dtype]
        outputs[name] = torch.full(like.shape, float("nan"), dtype=dtype)
    given = [tensors[t.name] for t in a.tensors]
    made = emulated(emit(a, loop_bounds(a), "neon"), given, sizes, list(outputs.values()), threads)
    return dict(zip(outputs, made, strict=True))


def emulated(
    source: str, given: Sequence[torch.Tensor], sizes: Sequence[int], outputs: Sequence[torch.Tensor], threads: int = 1
) -> list[torch.Tensor]:
    """What a call of the NEON kernel of `source` makes of its contiguous `outputs`."""
    emulator = _tools()[1]
    folder = Path(_folder.name)
    call, result = folder / "call", folder / "result"
    call.write_bytes(_call(given, sizes, outputs))
    files = (_caller(), _kernel(source), call, result)
    command = [emulator, "-L", str(ROOT), *map(str, files)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr}"
    at, raw = 0, bytearray(result.read_bytes())
    found: list[torch.Tensor] = []
    for x in outputs:
        size = x.numel() * x.element_size()
        found.append(torch.frombuffer(raw, dtype=x.dtype, count=x.numel(), offset=at).reshape(x.shape) if size else x)
        at += size
    return found


def _call(inputs: Sequence[torch.Tensor], sizes: Sequence[int], outputs: Sequence[torch.Tensor]) -> bytes:
    """What cpp_caller.cpp reads."""
    spans = [_span(t) for t in (*inputs, *outputs)]
    words = [len(inputs), len(sizes), len(outputs), *sizes]
    for t, span in zip((*inputs, *outputs), spans, strict=True):
        words += [span.numel() * t.element_size(), t.ndim, *t.stride()]
    return struct.pack(f"{len(words)}q", *words) + b"".join(bytes(s.view(torch.uint8).numpy()) for s in spans)


def _span(t: torch.Tensor) -> torch.Tensor:
    """All of the memory between a tensor's first and last element, so that its strides stay what they are."""
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return t.as_strided((last + 1 if t.numel() else 0,), (1,))


def check_backward_emulated(
    g: AttentionGrad, tensors: Mapping[str, torch.Tensor], sizes: Sequence[int], threads: int = 1
) -> None:
    """Holds the NEON backward against the equations; see `cpp_kernels.backward.check_backward`."""
    given = given_of(g.attention, dict(tensors), sizes)
    source = emit_gradient(g, loop_bounds(g.by_key, rows=True), "neon")
    inputs = [*(tensors[t.name] for t in g.attention.tensors), *given]
    hold(g, dict(tensors), given, sizes, emulated(source, inputs, sizes, empty_outputs(g, sizes), threads), "neon")


def check_emulated(a: Attention, tensors: Mapping[str, torch.Tensor], sizes: Sequence[int], threads: int = 1) -> None:
    """Holds the NEON kernel against the interpreter; see `cpp_kernels.build.check`."""
    compare(a, tensors, sizes, run_emulated(a, tensors, sizes, threads))
