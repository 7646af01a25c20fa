"""What the skeleton is told about a processor: lanes, register tiles and block sizes."""

from __future__ import annotations

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
KEYS = 128  # keys a block
GROUP_TILES = 8  # tiles that share one pass over the keys
