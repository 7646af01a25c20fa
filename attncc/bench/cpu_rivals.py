"""The rivals of a row on a CPU: the same attention, on the same tensors, by other means.

A rival that cannot say the attention, or would take too long, raises ValueError with the reason."""

from __future__ import annotations

import ctypes
import math
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import dropout, scaled_dot_product_attention

from attncc.bench.cpu_rows import CpuRow
from attncc.bench.row import Row, grid, mask_of
from attncc.ir import parse_attention, print_attention
from attncc.kernels.build import built
from attncc.runtime.cpp import CppToolchain, detect_isa

Tensors = dict[str, torch.Tensor]
Call = Callable[[], object]

#: What a rival may take for one call, in seconds, by an estimate; and how many scores may exist at once.
LONGEST, MOST_SCORES = 12.0, 1 << 28


def spec(row: Row) -> str:
    """The IR text of a row as the driver would hand it over."""
    return print_attention(parse_attention(row.text))


def ours(row: Row, t: Tensors) -> tuple[Call, torch.Tensor]:
    """A call of our kernel, and the tensor it writes, (B, HK * G, N, D)."""
    a = parse_attention(row.text)
    found = built(spec(row), "cpu")
    if found.language != "cpp":
        raise ValueError(f"no C++ kernel: {found.reason}")
    out = torch.empty(row.batch, row.heads, row.group, row.rows, row.d, dtype=t["q"].dtype)
    tensors = [t[x.name] for x in a.tensors]
    return lambda: found.kernel(tensors, [], [out]), out.view(row.batch, -1, row.rows, row.d)


def _scores(row: Row) -> int:
    return row.batch * row.heads * row.group * row.rows * row.keys


def _affordable(row: Row, operations_a_second: float) -> None:
    seconds = 4 * _scores(row) * row.d / operations_a_second
    if seconds > LONGEST:
        raise ValueError(f"about {seconds:.0f} s a call")


def sdpa_mask(row: Row, t: Tensors) -> torch.Tensor | None:
    """Mask and bias as one tensor: boolean where there is no bias."""
    mask = None if row.causal and row.score_mod is None else mask_of(row, t)
    if row.score_mod is None:
        return mask
    _, h, i, j = grid(row, t["q"].device)
    zero = torch.zeros(1, 1, 1, 1)
    score = row.score_mod(t)
    bias, other = score(zero, 0, h, i, j), score(zero + 1, 0, h[:, :1], i[:, :, :1], j[..., :1])
    if not torch.allclose(other, score(zero, 0, h[:, :1], i[:, :, :1], j[..., :1]) + 1):
        raise ValueError("SDPA takes a bias, not a function of the score")
    return (bias if mask is None else bias.masked_fill(~mask, -math.inf)).to(t["q"].dtype)


def sdpa(row: Row, t: Tensors) -> Call:
    """The best way to say it: the causal flag where that is the mask, a group's queries folded onto their key head."""
    _affordable(row, 60e9)
    q, k, v, mask = t["q"], t["k"], t["v"], sdpa_mask(row, t)
    if row.group == 1:
        causal = row.causal and mask is None
        return lambda: scaled_dot_product_attention(q, k, v, mask, dropout_p=row.dropped, is_causal=causal)
    if row.causal and mask is None:
        mask = mask_of(row, t)
    shape = (row.batch, row.heads, row.group * row.rows, row.d)
    if mask is not None:
        mask = mask.repeat(1, 1, row.group, 1)
    return lambda: scaled_dot_product_attention(q.reshape(shape), k, v, attn_mask=mask).view(q.shape)


def sdpa_gqa(row: Row, t: Tensors) -> Call:
    if row.group == 1:
        raise ValueError("no grouped heads")
    mask = sdpa_mask(row, t)
    return lambda: scaled_dot_product_attention(t["q"], t["k"], t["v"], attn_mask=mask, enable_gqa=True)


def flex(row: Row, t: Tensors, *, anew: bool = False) -> Call:
    """FlexAttention compiled; `anew` makes its block mask in every call, as a model with changing masks must."""
    from torch.nn.attention import flex_attention as module  # noqa: PLC0415  slow to import

    _affordable(row, 15e9)
    if anew and row.mask_mod is None:
        raise ValueError("no mask to build")
    per_sequence = row.batch if "length" in t else None

    def block_mask() -> Any:
        if row.mask_mod is None:
            return None
        return module.create_block_mask(row.mask_mod(t), per_sequence, None, row.rows, row.keys, device="cpu")

    compiled: Any = torch.compile(module.flex_attention, dynamic=False)
    score_mod, kept = None if row.score_mod is None else row.score_mod(t), block_mask()
    return lambda: compiled(t["q"], t["k"], t["v"], score_mod=score_mod, block_mask=block_mask() if anew else kept,
                            enable_gqa=row.group > 1)  # fmt: skip


def eager(row: Row, t: Tensors, at: torch.Tensor | None = None) -> Callable[..., torch.Tensor]:
    """Scores, mask, softmax, product, as a model spells them; of the query rows `at` where given."""
    _, h, i, j = grid(row, t["q"].device)
    i = i if at is None else at.view(1, 1, -1, 1)
    b = torch.arange(row.batch).view(-1, 1, 1, 1)
    mask = None if row.mask_mod is None else row.mask_mod(t)(b, h[:, :1], i, j)
    score_mod = None if row.score_mod is None else row.score_mod(t)

    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if row.group > 1:
            k, v = k.repeat_interleave(row.group, 1), v.repeat_interleave(row.group, 1)
        s = (q @ k.transpose(-1, -2)).float() * row.d**-0.5
        s = s if score_mod is None else score_mod(s, 0, h, i, j)
        s = s if mask is None else s.masked_fill(~mask, -math.inf)
        return dropout(torch.softmax(s, -1).to(q.dtype), row.dropped) @ v

    return model


def inductor(row: Row, t: Tensors) -> Call:
    if _scores(row) > MOST_SCORES:
        raise ValueError(f"{_scores(row) * 4 / 2**30:.0f} GiB of scores")
    _affordable(row, 15e9)
    compiled = torch.compile(eager(row, t), dynamic=False)
    return lambda: compiled(t["q"], t["k"], t["v"])


_STREAM = """
#include <omp.h>
#include <stdint.h>
typedef float lanes __attribute__((vector_size(64), aligned(64), may_alias));
extern "C" __attribute__((visibility("default")))
float read_all(const char* const* parts, int64_t count, int64_t bytes) {
    float all = 0;
#pragma omp parallel reduction(+ : all)
    {
        const int64_t me = omp_get_thread_num(), us = omp_get_num_threads(), lines = bytes / 512;
        lanes sum[8] = {};
        for (int64_t p = 0; p < count; ++p)
            for (int64_t n = lines * me / us; n < lines * (me + 1) / us; ++n)
                for (int x = 0; x < 8; ++x) sum[x] += ((const lanes*)(parts[p] + n * 512))[x];
        for (int x = 1; x < 8; ++x) sum[0] += sum[x];
        for (int x = 0; x < 16; ++x) all += sum[0][x];
    }
    return all;
}
"""


@cache
def _stream() -> Any:
    toolchain = CppToolchain.find()
    if toolchain is None:
        raise ValueError("no C++ compiler")
    with tempfile.TemporaryDirectory(prefix="attncc-bench-") as folder:
        out = Path(folder) / "stream.so"
        toolchain.compile(_STREAM, detect_isa(), out)
        library = ctypes.CDLL(str(out))
    library.read_all.restype = ctypes.c_float
    return library


def read(row: Row, t: Tensors) -> Call:
    """Reading all keys and values once, in order, summed as float32: what no kernel that reads them all can beat."""
    if row.rows > 8:
        raise ValueError("not bound by reading")
    parts = (ctypes.c_void_p * 2)(t["k"].data_ptr(), t["v"].data_ptr())
    count, size = ctypes.c_int64(2), ctypes.c_int64(t["k"].numel() * t["k"].element_size())
    return lambda: _stream().read_all(parts, count, size)


def plain(row: CpuRow, t: Tensors) -> Call:
    if row.plain is None:
        raise ValueError("no row to compare with")
    return ours(row.plain, t)[0]


RIVALS: dict[str, Callable[[CpuRow, Tensors], Call]] = {
    "sdpa": lambda row, t: sdpa(row.row, t),
    "sdpa gqa": lambda row, t: sdpa_gqa(row.row, t),
    "inductor": lambda row, t: inductor(row.row, t),
    "flex": lambda row, t: flex(row.row, t),
    "flex + mask": lambda row, t: flex(row.row, t, anew=True),
    "plain": plain,
    "read": lambda row, t: read(row.row, t),
}
