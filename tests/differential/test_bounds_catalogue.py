"""The catalogue of masks, alone and combined: what tiles visit against the fewest blocks that any tile could."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masks.bounds import blocks, check_sound
from masks.catalogue import CATALOGUE, Mask, N

from attncc.passes.bounds.bounds import loop_bounds
from attncc.passes.tables.spans import spanned, tables


@pytest.mark.parametrize("name", CATALOGUE)
def test_blocks_visited_and_blocks_full(name: str) -> None:
    mask = CATALOGUE[name]
    assert mask.why or (not mask.more and not mask.meet)
    worst = 0
    for rows in (16, 32, 64, 128):
        found = spanned(mask.attention(), rows)
        assert len(found.bounds.visit) <= 8 and len(found.bounds.full) <= 8
        tensors = mask.tensors()
        tensors |= tables(found, tensors)
        visited, some, full, every = check_sound(found.attention, found.bounds, (), tensors, rows)
        one_kind = [t for t in range(N // rows) if mask.meet % rows == 0 or mask.meet // rows != t]
        for width in (32, 64, 128):
            more = blocks(visited, width).sum(-1) - blocks(some, width).sum(-1)
            worst = max(worst, int(more.max()))
            found_full, all_full = (blocks(x, width, "all")[..., one_kind, :] for x in (full, every))
            assert torch.equal(found_full, all_full), f"{found_full.sum()} of {all_full.sum()} full blocks"
    assert worst == mask.more


def combined(first: Mask, second: Mask, how: str) -> Mask:
    declared = dict.fromkeys(x.strip() for x in (first.declared + ";" + second.declared).split(";") if x.strip())
    text = f"({first.text}) {how} ({second.text})"
    return replace(first, text=text, declared="; ".join(declared), data=lambda g: first.data(g) | second.data(g))


def conflict(first: Mask, second: Mask) -> bool:
    """Whether the two declare one name with different shapes."""
    declared = {x.strip() for x in (first.declared + ";" + second.declared).split(";") if x.strip()}
    names = [x.split(":")[0] for x in declared]
    return len(set(names)) < len(names)


NAMES = st.sampled_from(sorted(CATALOGUE))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(NAMES, NAMES, st.sampled_from(["and", "or", "and not", "or not"]), st.sampled_from([16, 64]), st.booleans())
def test_combinations_are_covered(one: str, two: str, how: str, rows: int, with_tables: bool) -> None:
    if conflict(CATALOGUE[one], CATALOGUE[two]):
        return
    mask = combined(CATALOGUE[one], CATALOGUE[two], how)
    a, tensors = mask.attention(), mask.tensors(1)
    if with_tables:
        found = spanned(a, rows)
        check_sound(found.attention, found.bounds, (), tensors | tables(found, tensors), rows)
    else:
        check_sound(a, loop_bounds(a), (), tensors, rows)
