"""Batch axes that share their keys, and batch axes that can be cut: against what the parts of a node give."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from random_ir.programs import Program, programs

from attncc.codegen.triton.rows import row_axes
from attncc.ir import Attention, Axis, Const, Expr, Size, Tensor, interpret, parse_attention, verify
from attncc.ir.analysis import Shard, folded_axes, shardable_axes
from attncc.ir.build import const
from attncc.ir.evaluate import Evaluator
from attncc.ir.expr import Index
from attncc.ir.interpret import extent, size_table
from attncc.passes.bounds.bounds import loop_bounds

EXAMPLES = settings(
    max_examples=120, deadline=None, database=None, suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)  # fmt: skip


def attention(**changed: str) -> Attention:
    """A grouped attention with some of its lines changed."""
    lines = {"mask": "j <= i", "score": "s", "sink": "", "q": "q[b, hk * 4 + g, i, d]", "k": "k[b, hk, j, d]",
             "tensors": "", "sizes": "B, N", "batch": "b = B, hk = 2, g = 4"} | changed  # fmt: skip
    more = "".join(f"tensor {x}\n" for x in lines["tensors"].split("; ") if x)
    return verify(parse_attention(
        f"attention\nsize   {lines['sizes']}\nbatch  {lines['batch']}\naxis   i = N, j = N, d = 8, e = 8\n"
        f"tensor q: f32[B, 8, N, 8]\ntensor k: f32[B, 2, N, 8]\ntensor v: f32[B, 2, N, 8]\n{more}"
        f"q      {lines['q']}\nk      {lines['k']}\nv      {lines['k'].replace('k[', 'v[').replace(', d]', ', e]')}\n"
        f"score  {lines['score']}\nmask   {lines['mask']}\nnorm   softmax\nempty  zero\n{lines['sink']}"
        "weight w\ngive   out\ndtype  f32\n"
    ))  # fmt: skip


def names(axes: tuple[Axis, ...]) -> list[str]:
    return [x.name for x in axes]


# ---- folded ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "folded"),
    [
        ("j <= i", ["g"]),
        ("i - j < 9 + g", []),  # an end of an interval
        ("(j - g * 64) % 256 < 64", []),  # a stripe of its own for each head
        ("(j - hk * 64) % 256 < 64", ["g"]),
        ("(j - g) % 2 < 2", ["g"]),  # which hides nothing
    ],
)
def test_bounds_keep_heads_apart(mask: str, folded: list[str]) -> None:
    a = attention(mask=mask)
    bounds = loop_bounds(a, rows=True)
    assert names(folded_axes(a, bounds.expressions)) == folded
    assert names(row_axes(a, bounds)) == [*folded, "i"]


def test_stripes_that_no_kernel_gathers_keep_nothing_apart() -> None:
    """Those that leave nearly all keys, and all of them where the blocks to visit are listed."""
    wide, narrow = attention(mask="(j - g) % 64 < 60"), attention(mask="(j - g * 64) % 256 < 64")
    assert names(row_axes(wide, loop_bounds(wide, rows=True))) == ["g", "i"]
    assert names(row_axes(narrow, loop_bounds(narrow, rows=True), lists=True)) == ["g", "i"]


@seed(11)
@EXAMPLES
@given(programs(longest=12, largest_head=4))
def test_folded_axes_change_nothing_that_rows_share(program: Program) -> None:
    a, tensors, sizes = program
    bounds = loop_bounds(a, rows=True)
    folded = folded_axes(a, bounds.expressions)
    table = size_table(a, sizes)
    assert set(folded) <= set(a.batch)
    for x in (*a.k.index, *a.v.index, *bounds.expressions):
        leaves: dict[Expr, torch.Tensor] = {s: torch.tensor(n) for s, n in table.items()}
        leaves |= {x.index: torch.zeros((), dtype=torch.int64) for x in (*a.batch, a.i, a.j, a.d, a.e)}
        leaves |= {Index(n): torch.tensor(m) for n, m in (("i0", 0), ("i1", 1))}
        leaves |= {r.index: torch.zeros((), dtype=torch.int64) for r in bounds.rows}
        first = Evaluator(leaves, tensors, torch.float64)(x)
        last = {x.index: torch.tensor(extent(x.extent, table) - 1) for x in folded}
        assert torch.equal(first, Evaluator({**leaves, **last}, tensors, torch.float64)(x))


# ---- shards ----------------------------------------------------------------------------------------------------------


def part(p: Program, shard: Shard, first: int, end: int) -> Program:
    """The program of indices [first, end) of a batch axis."""
    a, tensors, sizes = p
    axis = shard.axis
    whole = extent(axis.extent, size_table(a, sizes))
    length: Const | Size = const(end - first)
    batch = tuple(replace(x, extent=length) if x is axis else x for x in a.batch)
    declared: list[Tensor] = []
    cut: dict[str, torch.Tensor] = {}
    for t in a.tensors:
        dim = shard.tensors.get(t.name)
        cut[t.name], shape = tensors[t.name], list(t.shape)
        if dim is not None:
            each = tensors[t.name].shape[dim]
            start, stop = first * each // whole, end * each // whole
            cut[t.name] = tensors[t.name].narrow(dim, start, stop - start)
            shape[dim] = const(stop - start)
        declared.append(Tensor(t.name, t.dtype, tuple(shape)))
    return Program(verify(replace(a, batch=batch, tensors=tuple(declared))), cut, sizes)


def check(p: Program) -> int:
    """Whether each shard gives its part of the output; how many there are."""
    a, tensors, sizes = p
    want = interpret(a, tensors, sizes, compute=torch.float64)
    shards = shardable_axes(a)
    for shard in shards:
        count = extent(shard.axis.extent, size_table(a, sizes))
        step = shard.multiple * max(1, count // (2 * shard.multiple))
        ends = [*range(0, count, step), count]
        pieces = [part(p, shard, *run) for run in itertools.pairwise(ends)]
        got = [interpret(x.attention, x.tensors, x.sizes, compute=torch.float64) for x in pieces]
        for name, value in want.items():
            together = torch.cat([x[name] for x in got], a.batch.index(shard.axis))
            assert torch.equal(torch.nan_to_num(value, nan=7e7), torch.nan_to_num(together, nan=7e7)), shard
    return len(shards)


def test_shards_give_their_part_of_the_output() -> None:
    found = 0

    @seed(12)
    @EXAMPLES
    @given(programs(longest=12, largest_head=4))
    def each(program: Program) -> None:
        nonlocal found
        found += check(program)

    each()
    assert found > 60


@pytest.mark.parametrize(
    ("changed", "shards"),
    [
        ({}, {"b": ({"q": 0, "k": 0, "v": 0}, 1), "hk": ({"q": 1, "k": 1, "v": 1}, 1)}),
        ({"batch": "b = B, h = 8", "q": "q[b, h, i, d]", "k": "k[b, h // 4, j, d]"},
         {"b": ({"q": 0, "k": 0, "v": 0}, 1), "h": ({"q": 1, "k": 1, "v": 1}, 4)}),
        ({"batch": "b = B, h = 8", "q": "q[b, h, i, d]", "k": "k[b, 0, j, d]", "score": "s * slope[h]",
          "tensors": "slope: f32[8]"}, {"b": ({"q": 0, "k": 0, "v": 0}, 1), "h": ({"q": 1, "slope": 0}, 1)}),
        ({"mask": "j <= i + hk"}, {"b": ({"q": 0, "k": 0, "v": 0}, 1)}),  # counts heads
        ({"score": "s * slope[1 - hk]", "tensors": "slope: f32[2]"}, {"b": ({"q": 0, "k": 0, "v": 0}, 1)}),
        ({"score": "s * slope[hk] + slope[0]", "tensors": "slope: f32[2]"}, {"b": ({"q": 0, "k": 0, "v": 0}, 1)}),
        ({"score": "s * slope[hk]", "tensors": "slope: f32[3]"}, {"b": ({"q": 0, "k": 0, "v": 0}, 1)}),
        ({"score": "s * slope[order[hk]]", "tensors": "slope: f32[3]; order: i64[2]"},
         {"b": ({"q": 0, "k": 0, "v": 0}, 1), "hk": ({"q": 1, "k": 1, "v": 1, "order": 0}, 1)}),
        ({"score": "s / float(B)"}, {"hk": ({"q": 1, "k": 1, "v": 1}, 1)}),  # the size counts more than the axis
    ],
)  # fmt: skip
def test_which_axes_can_be_cut(changed: dict[str, str], shards: dict[str, tuple[dict[str, int], int]]) -> None:
    a = attention(**changed)
    assert {x.axis.name: (dict(x.tensors), x.multiple) for x in shardable_axes(a)} == shards
    generator = torch.Generator().manual_seed(0)
    values = {"B": 3, "N": 5}
    tensors = {t.name: torch.randn([values.get(repr(n), 0) or int(repr(n)) for n in t.shape], generator=generator)
               for t in a.tensors if t.dtype == "f32"}  # fmt: skip
    check(Program(a, {**tensors, "order": torch.tensor([2, 0])}, [3, 5]))
