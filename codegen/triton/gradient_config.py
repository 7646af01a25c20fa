"""The declared space of configurations of a backward's two kernels, and what a machine has room for."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from attncc.codegen.triton.config import TritonConfig, extent_of, machine
from attncc.codegen.triton.operands import chunks
from attncc.ir.attention import DTYPES
from attncc.ir.attention_grad import AttentionGrad
from attncc.ir.expr import free, loads

#: A configuration for the kernel that goes over keys, and one for that which goes over query rows.
Pair = tuple[TritonConfig, TritonConfig]

# rows of a tile, keys of a block, warps, stages
_ROWS = (
    (128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 4, 2), (32, 32, 4, 2), (16, 32, 4, 1), (16, 16, 4, 1),
)  # fmt: skip
_KEYS = (
    (128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 4, 2), (32, 16, 4, 1), (16, 16, 4, 1),
)  # fmt: skip
_AMD = ((64, 64, 4, 1), (64, 32, 4, 1), (32, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1))
#: Exact float32 products are made by the ordinary units, whose operands all pass through registers.
_FLOAT32 = ((32, 32, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1), (16, 16, 4, 1))

#: Sums that a thread may hold through a loop: with more, what the loop itself computes is put aside.
_MOST_SUMS = 96


def gradient_configs(
    g: AttentionGrad, capability: str, *, tf32: bool = False, lists: bool = False
) -> tuple[Pair, ...]:  # fmt: skip
    """The configurations worth trying for `g`, best guess first; what does not fit the machine is left out.

    `tf32` says that float32 products may be made from rounded factors, `lists` that the kernels walk lists of blocks.
    Raises ValueError for a capability that is neither "sm_NN" nor "gfxNNN"."""
    amd = capability.startswith("gfx")
    float32 = _width(g) >= 4
    precision = "tf32" if tf32 and float32 and not amd else "ieee"

    def fitting(by_key: bool) -> list[TritonConfig]:
        shapes = _AMD if amd else _KEYS if by_key else _ROWS
        if float32 and not amd:
            shapes = _FLOAT32 if precision == "ieee" else tuple(x for x in shapes if x[0] * x[1] <= 64 * 32)
        if float32 and precision == "ieee" and not by_key and max(_channels(g)) > 64:
            shapes = tuple(x for x in shapes if x[0] * x[1] <= 32 * x[2])
        space = [TritonConfig(m, n, w, s, precision=precision, lists=lists) for m, n, w, s in shapes]
        if not by_key and any(x.over == "j - i" for x in g.loads):
            space = [c for c in space if c.block_m <= c.block_n]  # a turned row comes around once at most
        if capability.startswith("sm_10"):  # what is in flight takes registers beside those of tensor memory
            space = [replace(c, stages=1) for c in space]
        found = [c for c in space if gradient_fits(g, c, capability, by_key=by_key)]
        return found[:2] or [TritonConfig(16, 16, 4, 1, precision=precision, lists=lists)]

    return tuple(product(fitting(False), fitting(True)))


def gradient_fits(g: AttentionGrad, c: TritonConfig, capability: str, *, by_key: bool) -> bool:
    """Whether a machine has room for the tiles of a kernel."""
    m = machine(capability)
    threads = c.warps * m.lanes
    d, e = _channels(g)
    sums = c.block_m * (d + e if by_key else d) // threads
    more = 0
    if not by_key and m.copies:  # products take the tile's own rows from registers
        more = _width(g) * c.block_m * (d + e) // 16 // threads
    elif not by_key and d + e > 256:
        more = 64
    within = sums <= _MOST_SUMS and sums + more + _registers(g, c, by_key) // threads <= m.tile_registers
    return within and _shared(g, c) <= m.shared


def _width(g: AttentionGrad) -> int:
    a = g.attention
    return max(DTYPES[a.tensor(x.tensor).dtype][1] for x in (a.q, a.k, a.v))


def _channels(g: AttentionGrad) -> tuple[int, int]:
    d, e = (sum(n for n, _ in chunks(extent_of(x.extent))) for x in (g.attention.d, g.attention.e))
    return d, e


def _shared(g: AttentionGrad, c: TritonConfig) -> int:
    """Bytes of the tiles in flight, those of the tile's own rows, and of weights and their gradients as factors."""
    d, e = _channels(g)
    return _width(g) * ((max(c.stages, 1) * c.block_n + c.block_m) * (d + e) + 2 * c.block_m * c.block_n)


def _registers(g: AttentionGrad, c: TritonConfig, by_key: bool) -> int:
    """32-bit numbers that a program holds beside its sums: scores, weights, their gradients, and what pairs read."""
    d, e = _channels(g)
    a = g.attention
    roots = (a.score, a.mask, g.by_score, g.by_weight, *(x.slope for x in g.loads))
    pairs = [x for x in loads(*roots) if {a.i.index, a.j.index} <= free(x)]
    factors = 0 if _width(g) < 4 else (c.block_m + c.block_n) * (d + e) // 2
    turned = any(x.over == "j - i" for x in g.loads) and not by_key
    return factors + c.block_m * c.block_n * (5 + 12 * (len(pairs) - turned) + 6 * turned) // 2
