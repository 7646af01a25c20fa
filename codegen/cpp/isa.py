"""What the skeleton is told about a processor: lanes, register tiles and block sizes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

ISAS = ("amx", "avx512bf16", "avx512", "avx2", "neon")


@dataclass(frozen=True)
class Isa:
    """`vector_bytes` a register; products keep `tile_rows` x `tile_vectors` of them. `pairs`: bfloat16 products run on
    pairs of elements, `tiles`: in the matrix unit. `f16_row`: bits of the register that half conversions fill."""

    vector_bytes: int
    tile_rows: int
    tile_vectors: int
    f16_row: int
    pairs: bool = False
    tiles: bool = False


TABLE: dict[str, Isa] = {
    "amx": Isa(64, 6, 4, 512, pairs=True, tiles=True),
    "avx512bf16": Isa(64, 6, 4, 512, pairs=True),
    "avx512": Isa(64, 6, 4, 512),
    "avx2": Isa(32, 6, 2, 256),
    "neon": Isa(16, 4, 4, 0),
}
assert tuple(TABLE) == ISAS
QUERIES = 64  # lanes of a tile at most
BAND_QUERIES = 32  # the same where keys move along with rows: what some rows of a tile see and others do not is less
GROUP_QUERIES = 512  # lanes of the tiles that share one pass over the keys
KEYS = 96  # keys a block, a multiple of 32 and of the rows of a register tile
PAIR_KEYS = 192  # the same where sums of values go on from block to block, in vectors
TILE_KEYS = 512  # the same in the matrix unit, which loads and stores all sums of values once a block


def machine(isa: Isa, name: str, *, double: bool, pairs: bool, tiles: bool, coarse: bool,
            band: bool = False, skips: bool = False) -> dict[str, int | str]:
    """What the skeleton is told by `#define`: the machine, the compute type, and which products run in
    bfloat16; `coarse`: functions need be right to the rounding of bfloat16 alone; `band`: the keys that rows see move
    along with them; `skips`: a block may weigh next to nothing and be left out, a short one sooner than a long one."""
    keys = KEYS if tiles and skips else TILE_KEYS if tiles else PAIR_KEYS if pairs else KEYS
    lanes = isa.vector_bytes // (8 if double else 4)
    queries = BAND_QUERIES if band else QUERIES
    tile_vectors = min(isa.tile_vectors, queries // lanes)
    tile_rows = isa.tile_rows * isa.tile_vectors // tile_vectors
    low = [x for n in range(lanes // 2) for x in (n, n + lanes)]
    defines: dict[str, int | str] = {
        "LANES": lanes, "QUERIES": queries, "KEYS": keys, "GROUP_TILES": GROUP_QUERIES // queries,
        "SLANT_ROOM": max(GROUP_QUERIES + keys + 2 * lanes, keys * lanes),
        "TILE_ROWS": tile_rows, "TILE_VECTORS": tile_vectors,
        "PAIRS": int(pairs), "TILES": int(tiles), "COARSE": int(coarse),
        "REAL_IS_DOUBLE": int(double), "BIAS": 1023 if double else 127, "MANTISSA": 52 if double else 23,
        "LARGEST": "__DBL_MAX__" if double else "__FLT_MAX__",
        "LN2": "0.69314718055994530942" if double else "0.69314718055994530942f",
        "LN2_HIGH": "6.93147180369123816490e-01" if double else "0.693359375f",
        "LN2_LOW": "1.90821492927058770002e-10" if double else "-2.12194440e-4f",
        "FN(name)": "name" if double else "name##f",
        "F16_ROW": 0 if double else isa.f16_row, "F16_SCALAR": "__fp16" if name == "neon" else "_Float16",
        "ZIP_LOW": _listed(low), "ZIP_HIGH": _listed(x + lanes // 2 for x in low), "EVERY_LANE": _listed(range(lanes)),
    }  # fmt: skip
    if isa.vector_bytes == 64 and not double:
        defines["WIDE_512"] = 1
    return defines


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))
