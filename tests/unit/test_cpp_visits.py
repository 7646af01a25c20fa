"""How a kernel's rows and keys are cut follows from the shape of what its tiles visit."""

from __future__ import annotations

import re

import pytest

from attncc.codegen.cpp import ISAS, emit
from attncc.codegen.cpp.visits import is_band
from attncc.ir import Attention, parse_attention
from attncc.passes.bounds.bounds import loop_bounds

TEXT = """attention
batch  b = 1, h = 2
axis   i = 512, j = 512, d = 64, e = 64
tensor q: {dtype}[1, 2, 512, 64]
tensor k: {dtype}[1, 2, 512, 64]
tensor v: {dtype}[1, 2, 512, 64]
q      q[b, h, i, d]
k      k[b, h, j, d]
v      v[b, h, j, e]
score  s * 0.125
mask   {mask}
norm   softmax
empty  zero
weight w
{dropped}give   out
dtype  {dtype}
"""
# Whether both ends of what is visited move along with the rows.
BANDS = {
    "True": False, "j <= i": False, "j <= i and i - j < 64": True, "abs(i - j) <= 32": True, "i // 64 == j // 64": True,
    "j < 16 or j <= i and i - j < 64": False, "abs(i // 16 - j // 16) <= 3 and abs(i % 16 - j % 16) <= 3": True,
}  # fmt: skip


def attention(mask: str, dtype: str = "bf16", dropped: str = "") -> Attention:
    return parse_attention(TEXT.format(mask=mask, dtype=dtype, dropped=dropped))


def defined(source: str) -> dict[str, int]:
    return {name: int(n) for name, n in re.findall(r"^#define (\w+) (\d+)$", source, re.MULTILINE)}


@pytest.mark.parametrize("mask", BANDS)
def test_bands(mask: str) -> None:
    a = attention(mask)
    bounds = loop_bounds(a)
    assert is_band(a, bounds) == BANDS[mask], bounds.visit


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f64"])
def test_a_tile_of_a_band_has_half_the_rows(dtype: str, isa: str) -> None:
    """And as many tiles more share a pass, and as many registers hold its sums."""
    masks = ("True", "i // 64 == j // 64")
    wide, band = (defined(emit(a, loop_bounds(a), isa)) for a in (attention(m, dtype) for m in masks))
    assert band["QUERIES"] * 2 == wide["QUERIES"]
    assert band["QUERIES"] * band["GROUP_TILES"] == wide["QUERIES"] * wide["GROUP_TILES"]
    for x in (wide, band):
        assert x["TILE_VECTORS"] * x["LANES"] <= x["QUERIES"]
    assert band["TILE_ROWS"] * band["TILE_VECTORS"] == wide["TILE_ROWS"] * wide["TILE_VECTORS"]


def test_blocks_of_the_matrix_unit_are_long_where_none_is_left_out() -> None:
    whole, dropping = attention("True"), attention("True", dropped="drop   0.01\n")
    long, short = (defined(emit(a, loop_bounds(a), "amx"))["KEYS"] for a in (whole, dropping))
    assert long >= 4 * short
    assert {defined(emit(a, loop_bounds(a), "avx512"))["KEYS"] for a in (whole, dropping)} == {short}
