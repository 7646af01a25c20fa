"""Tables of spans: bounds that read them are sound, and exact where what they describe is contiguous."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masks.bounds import attention, check_sound, data, visible

from attncc.ir import Const, Load, Tensor, interpret, parse_expr, verify
from attncc.passes.tables.spans import spanned, tables

ROW = "min(i, M - 1)"

# Masks that read data by key or by row and see one run of keys in each row, or a fixed number of them.
CONTIGUOUS = {
    "documents": f"doc[b, {ROW}] == doc[b, j]",
    "causal documents": f"doc[b, {ROW}] == doc[b, j] and j <= i",
    "documents with a window": f"doc[b, {ROW}] == doc[b, j] and abs(i - j) <= 9",
    "share question": f"doc[b, {ROW}] == doc[b, j] and j <= i or doc[b, j] == 0",
    "left padding": "pad[b, j] and j <= i + (M - N)",
    "lengths": "j < len[b] and j <= i",
    "cache positions": "j <= pos[i]",
    "sliding cache": "j <= pos[i] and pos[i] - j < 11",
    "row starts": "start[b, i] <= j",
    "blockwise": f"doc[b, {ROW}] == doc[b, j] and j < (i // 8 + 1) * 8",
    "older documents": f"doc[b, j] < doc[b, {ROW}]",
    "rows switched off": "ok[b, i] and j <= i",
    "not padding": "not pad[b, j]",
}

SHAPES = [(2, 70, 70, 11), (1, 128, 128, 33), (2, 1, 90, 40), (1, 40, 64, 3)]


@pytest.mark.parametrize("name", CONTIGUOUS)
@pytest.mark.parametrize("tile", [1, 16, 64])
def test_visited_and_full_keys(name: str, tile: int) -> None:
    a = attention(CONTIGUOUS[name])
    found = spanned(a)
    verify(found.attention)
    for sizes in SHAPES:
        tensors = data(*sizes[:3])
        tensors |= tables(found, tensors, sizes)
        visited, some, full, every = check_sound(found.attention, found.bounds, sizes, tensors, tile)
        if tile == 1:
            assert torch.equal(visited, some) and torch.equal(full, every)
        # over several rows the hull of their runs is visited, and a key counts as full if one run holds it for all rows
        hull = (some.cumsum(-1) > 0) & (some.flip(-1).cumsum(-1).flip(-1) > 0)
        assert bool((hull | ~visited).all()), name


def test_documents_are_exact_for_tiles_too() -> None:
    a = attention(CONTIGUOUS["causal documents"])
    found = spanned(a)
    sizes = (2, 256, 256, 0)
    tensors = data(*sizes[:3])
    tensors |= tables(found, tensors, sizes)
    for tile in (16, 64):
        visited, some, full, every = check_sound(found.attention, found.bounds, sizes, tensors, tile)
        assert torch.equal(visited, some) and torch.equal(full, every)


def test_one_table_a_literal() -> None:
    a = attention(f"doc[b, {ROW}] == doc[b, j] and (j <= i or pad[b, j]) and doc[b, {ROW}] == doc[b, j]")
    found = spanned(a)
    assert [s.tensor.name for s in found.spans] == ["span0", "span1"]
    assert [repr(s.tensor.shape) for s in found.spans] == ["(B, N, 4)", "(B, 4)"]


def test_what_reads_no_key_needs_no_table() -> None:
    found = spanned(attention("j <= pos[i]"))
    assert not found.spans and found.bounds.rows
    assert all(not isinstance(x.expr, Load) or x.expr.tensor == "pos" for x in found.bounds.rows)


LITERALS = [
    f"doc[b, {ROW}] == doc[b, j]", f"doc[b, {ROW}] != doc[b, j]", f"doc[b, j] <= doc[b, {ROW}]", "pad[b, j]",
    "2 * doc[b, j] + h < start[b, i]", "start[b, min(j, N - 1)] <= i", "dense[b, i, j]",
    "start[b, min(j, N - 1)] == start[b, i]",
    "ok[b, i]", "j <= pos[i]", "j <= i", "i - j < 9", "j < len[b]", "doc[b, j] == h", "start[b, min(j, N - 1)] != 3",
]  # fmt: skip
PREDICATES = st.recursive(
    st.sampled_from(LITERALS).map(lambda x: f"({x})"),
    lambda inner: st.tuples(st.sampled_from(["and", "or"]), inner, inner).map(lambda t: f"({t[1]} {t[0]} {t[2]})")
    | inner.map(lambda x: f"(not {x})"),
    max_leaves=4,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(PREDICATES, st.sampled_from([(2, 37, 37, 9), (1, 64, 48, 20), (2, 1, 60, 31)]), st.sampled_from([1, 8, 32]),
       st.integers(0, 3), st.booleans())  # fmt: skip
def test_random_predicates_are_covered(
    mask: str, sizes: tuple[int, int, int, int], tile: int, seed: int, shuffled: bool
) -> None:
    a = attention(mask)
    found = spanned(a)
    tensors = data(*sizes[:3], seed)
    if shuffled:
        order = torch.randperm(sizes[2], generator=torch.Generator().manual_seed(seed))
        tensors |= {"doc": tensors["doc"][:, order], "pad": tensors["pad"][:, order]}
    tensors |= tables(found, tensors, sizes)
    check_sound(found.attention, found.bounds, sizes, tensors, tile)


def test_the_attention_computes_what_it_did() -> None:
    a = attention(CONTIGUOUS["causal documents"])
    found = spanned(a)
    sizes = (2, 30, 30, 0)
    tensors = data(*sizes[:3])
    more = tensors | tables(found, tensors, sizes)
    assert torch.equal(interpret(a, tensors, sizes)["out"], interpret(found.attention, more, sizes)["out"])
    assert torch.equal(visible(a, sizes, tensors), visible(found.attention, sizes, more))


def test_long_sequences_make_nothing_square() -> None:
    """131072 tokens of documents: a square of booleans alone would take 16 GiB, the tables take 2 MiB."""
    n = 1 << 17
    a = attention("doc[b, i] == doc[b, j] and j <= i and pad[b, j]", "N", "N")
    found = spanned(a)
    doc = torch.arange(n)[None] // 1000
    made = tables(found, {"doc": doc, "pad": torch.arange(n)[None] >= 5}, (1, n, n, 0))
    assert sum(t.numel() for t in made.values()) == 4 * n + 4
    span = made["span0"][0, ::1000, :2]
    assert torch.equal(span[:, 0], torch.arange(0, n, 1000, dtype=torch.int32))
    assert torch.equal(span[:, 1], (torch.arange(0, n, 1000, dtype=torch.int32) + 1000).clamp(max=n))


def test_float_literals_are_compared_as_the_attention_computes() -> None:
    """Differences that single precision cannot see decide in a float64 attention."""
    a = attention("j <= i", "8", "8")
    wide = replace(a, tensors=(*(replace(t, dtype="f64") if t.name in "qkv" else t for t in a.tensors),
                               Tensor("relevance", "f64", (Const(8),))))  # fmt: skip
    mask = parse_expr("1.0 < relevance[j]", {"j": a.j.index}, {"relevance": "float"})
    wide = verify(replace(wide, mask=mask))
    tensors = {n: x.double() for n, x in data(1, 8, 8).items() if n in "qkv"}
    tensors["relevance"] = 1.0 + torch.tensor([0, 0, 1, 1, 1, 0, 0, 0], dtype=torch.float64) * 1e-12
    found = spanned(wide)
    made = tables(found, tensors, (1, 8, 8, 0))
    assert made["span0"].tolist() == [2, 5, 2, 5]
