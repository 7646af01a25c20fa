"""Loop bounds against brute force: they cover what is visible, and for the masks listed here visit nothing more."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masks.bounds import attention, blocks, check_sound, data

from attncc.passes.bounds.bounds import analyse, loop_bounds

# Masks whose key intervals the bounds find exactly, and whose full keys too.
EXACT = {
    "full": "0 <= j",
    "causal": "j <= i",
    "causal to the right": "j <= i + (M - N)",
    "window": "j <= i and i - j <= 20",
    "bidirectional window": "i - j <= 20 and j - i <= 20",
    "window by absolute value": "abs(i - j) <= 20",
    "prefix": "j < P or j <= i",
    "global and sliding": "abs(i - j) <= 20 or i < 10 or j < 10",
    "streaming": "j < 4 or (j <= i and i - j < 30)",
    "chunked": "i // 32 == j // 32 and j <= i",
    "chunked, symbolic": "i // P == j // P and j <= i",
    "block causal": "j < (i // 32 + 1) * 32",
    "identity": "j == i",
    "not itself": "j != i",
    "lengths": "j < len[b]",
    "lengths and causal": "j < len[b] and j <= i",
    "head dependent": "h < 2 or (j <= i and i - j < 16)",
    "head dependent window": "j <= i and i - j < 8 * (h + 1)",
    "half resolution": "2 * j <= i",
    "guarded rows": "i < 40 and j <= i",
    "static cache": "j <= P",
    "halo": "(i // 16) * 16 - 4 <= j and j < (i // 16) * 16 + 20",
    "anticausal": "i <= j",
    "nothing": "j < 0",
    "a choice": "where(h == 1, j <= i, i <= j)",
    "several chunks": "j // 16 <= i // 16 and i // 16 - j // 16 <= 2",
}  # fmt: skip

SHAPES = [(2, 70, 70, 11), (1, 128, 128, 33), (1, 50, 130, 64), (2, 1, 90, 40)]


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("tile", [1, 16, 64])
def test_keys_visited_are_the_fewest(name: str, tile: int) -> None:
    a = attention(EXACT[name])
    bounds = loop_bounds(a)
    assert len(bounds.visit) <= 8 and len(bounds.full) <= 8
    for b, n, m, p in SHAPES:
        sizes, tensors = (b, n, m, p), data(b, n, m)
        visited, some, full, every = check_sound(a, bounds, sizes, tensors, tile)
        for width in (1, 32, 64):
            assert torch.equal(blocks(visited, width), blocks(some, width)), (name, sizes, width)
        assert torch.equal(full, every), (name, sizes)


@pytest.mark.parametrize("name", EXACT)
def test_static_sizes_too(name: str) -> None:
    a = attention(EXACT[name], "96", "96")
    visited, some, full, every = check_sound(a, loop_bounds(a), (1, 96, 96, 40), data(1, 96, 96), 32)
    assert torch.equal(visited, some) and torch.equal(full, every)


ATOMS = [
    "j <= i", "i - j < 13", "j - i < 7", "j < P", "j <= 4", "i < 10", "20 <= i", "i // 16 == j // 16", "j % 4 == 1",
    "(i - j) % 3 == 0", "h < 2", "j < len[b]", "pad[b, j]", "ok[b, i]", "doc[b, j] == doc[b, min(i, M - 1)]",
    "j <= pos[i]", "start[b, i] <= j", "blocks[h, min(i // 16, 7), min(j // 16, 7)]", "dense[b, i, j]", "j != i",
    "abs(i - j) <= 9", "min(i, 30) <= j", "j // 8 <= i // 8", "(j // 8 + h) % 4 == 0", "where(i < 30, j < 9, 30 <= j)",
    "(i // 8) * 8 <= j + 3", "3 * j <= 2 * i", "j % 8 <= i % 8", "j <= i % 24", "max(j, 5) <= i // 2",
]  # fmt: skip

PREDICATES = st.recursive(
    st.sampled_from(ATOMS).map(lambda x: f"({x})"),
    lambda inner: st.tuples(st.sampled_from(["and", "or"]), inner, inner).map(lambda t: f"({t[1]} {t[0]} {t[2]})")
    | inner.map(lambda x: f"(not {x})"),
    max_leaves=5,
)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(PREDICATES, st.sampled_from([(2, 37, 37, 9), (1, 64, 48, 20), (2, 1, 60, 31), (1, 48, 80, 3)]),
       st.sampled_from([1, 8, 32]), st.booleans())  # fmt: skip
def test_random_predicates_are_covered(mask: str, sizes: tuple[int, int, int, int], tile: int, rows: bool) -> None:
    a = attention(mask)
    found = analyse(a, rows=rows)
    b, n, m, _ = sizes
    visited, some, _, _ = check_sound(a, found.bounds, sizes, data(b, n, m, 1), tile)
    if found.bounds.exact:
        assert torch.equal(visited, some)
    if found.rows_exact and tile == 1:
        assert torch.equal(visited, some)
