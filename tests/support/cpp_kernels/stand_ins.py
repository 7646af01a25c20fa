"""Kernels for machines that are not here, by the host's compiler: NEON's skeleton in 16-byte vectors, and AMX with its
matrix unit written out in C++."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import torch

from attncc.codegen.cpp import emit
from attncc.ir import Attention, interpret
from attncc.ir.evaluate import DTYPE_OF
from attncc.passes.bounds.bounds import loop_bounds
from attncc.runtime.cpp import CppKernel
from cpp_kernels.build import host_isas, run, toolchain

_folder = tempfile.TemporaryDirectory(prefix="attncc-stand-ins-")

#: Eight tiles of 16 rows of 64 bytes. Numbers that are not normal are zero, as in the unit.
_UNIT = """
static thread_local uint8_t unit[8][16][64];
static float unit_number(const uint8_t* at) {
    uint32_t x = (uint32_t)(at[0] | at[1] << 8) << 16;
    if (!(x & 0x7f800000)) x &= 0x80000000;
    float f; memcpy(&f, &x, 4); return f;
}
static void unit_dot(int sum, int a, int b) {
    for (int m = 0; m < 16; ++m)
        for (int n = 0; n < 16; ++n) {
            float total; memcpy(&total, unit[sum][m] + 4 * n, 4);
            for (int k = 0; k < 32; ++k)
                total += unit_number(unit[a][m] + 2 * k) * unit_number(unit[b][k / 2] + 4 * n + 2 * (k % 2));
            memcpy(unit[sum][m] + 4 * n, &total, 4);
        }
}
#define TILE_ZERO(n) memset(unit[n], 0, sizeof unit[n])
#define TILE_LOAD(n, at, stride) do for (int r = 0; r < 16; ++r) \\
    memcpy(unit[n][r], (const char*)(at) + r * (int64_t)(stride), 64); while (0)
#define TILE_STORE(n, at, stride) do for (int r = 0; r < 16; ++r) \\
    memcpy((char*)(at) + r * (int64_t)(stride), unit[n][r], 64); while (0)
#define TILE_DOT(sum, a, b) unit_dot(sum, a, b)
"""
#: What each is compiled as.
AS = {"neon": "avx2", "amx": "avx512bf16"}


def runnable(isa: str) -> bool:
    """Whether this machine runs kernels of `isa`, or of what stands in for it."""
    every = host_isas(every=True)
    return isa in every or AS.get(isa) in every


def run_as(
    a: Attention, tensors: Mapping[str, torch.Tensor], sizes: Sequence[int], isa: str
) -> dict[str, torch.Tensor]:
    """Outputs by name of the kernel for `isa`, by its stand-in where this machine has no such instructions."""
    if isa in host_isas(every=True):
        return run(a, tensors, sizes, isa)
    outputs = {
        name: torch.full(like.shape, float("nan"), dtype=DTYPE_OF[a.dtype if name == "out" else a.compute_dtype])
        for name, like in interpret(a, tensors, sizes).items()
    }
    kernel = CppKernel(_compiled(emit(a, loop_bounds(a), isa), isa), a)
    kernel([tensors[t.name] for t in a.tensors], list(sizes), list(outputs.values()))
    return outputs


@cache
def _compiled(source: str, isa: str) -> Path:
    out = Path(_folder.name) / f"{abs(hash((source, isa)))}.so"
    if isa == "neon":
        source = source.replace("__fp16", "_Float16")
    else:
        start, end = source.find("#define TILE_ZERO"), source.find("// R x C tiles of out")
        source = source if start < 0 else source[:start] + _UNIT + source[end:]  # in bfloat16 alone it has the unit
        source = re.sub(r"syscall\([^;]*\);", "0;", source)
        source = re.sub(r'asm volatile\("(ldtilecfg|tilerelease)[^;]*;', "", source)
    toolchain().compile(source, AS[isa], out)
    return out
