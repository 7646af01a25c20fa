"""Maps of literals that are the same throughout blocks, wherever those begin: a bit says what the pairs of a row and a
key in it show, no more and no less."""

from __future__ import annotations

import pytest
import torch

from attncc.ir import Attention, Index, Load, parse_attention, print_attention
from attncc.ir.build import add, const, mul
from attncc.ir.evaluate import Evaluator
from attncc.ir.interpret import index_grid, size_table
from attncc.passes.bounds import block_maps
from attncc.passes.bounds.block_maps import _packed, _view, block_map, by_pair, keys_in, map_tables, words_of
from attncc.passes.tables.spans import spanned

N, M = 70, 90


def attention(rows: str, keys: str) -> Attention:
    return parse_attention(f"""attention
batch  b = 2, h = 2
axis   i = {N}, j = {M}, d = 8, e = 8
tensor q: f32[2, 2, {N}, 8]
tensor k: f32[2, 2, {M}, 8]
tensor v: f32[2, 2, {M}, 8]
tensor map: bool[2, 2, 30, 30]
tensor start: i64[2]
q      q[b, h, i, d]
k      k[b, h, j, d]
v      v[b, h, j, e]
score  s
mask   map[b, h, {rows}, {keys}]
norm   softmax
empty  zero
weight w
give   out
dtype  f32
""")


@pytest.mark.parametrize("group", [16, 64])
@pytest.mark.parametrize(
    ("rows", "keys"),
    [
        ("i // 8", "j // 16"), ("i // 128", "j // 32"), ("(i + start[b] % 8) // 8", "(j + start[b] % 4) // 4"),
        ("(i + 3) // 64", "(j + (0 - start[b]) % 24) // 24"), ("i // 24", "j // 12"), ("0", "(j + start[b]) // 16"),
        ("min(i, 29)", "(j + 5) // 16"),
    ],
)  # fmt: skip
def test_bits_are_what_the_pairs_show(rows: str, keys: str, group: int) -> None:
    a = attention(rows, keys)
    g = torch.Generator().manual_seed(0)
    tensors = {"map": torch.rand(2, 2, 30, 30, generator=g) < 0.3, "start": torch.tensor([3, 13])}
    assert not by_pair(a.mask, a)
    m = block_map(a.mask, a, "bits", group)
    words = map_tables([m], a, tensors)["bits"]
    grid = index_grid((*a.batch, a.i, a.j), size_table(a, []), torch.device("cpu"))
    pairs = Evaluator(grid, tensors, torch.float32)(a.mask).expand(2, 2, N, M)
    groups = -(-N // group) if "i" in rows else 1
    assert words.shape[-3] == groups
    for at in range(groups):
        part = pairs[:, :, at * group : (at + 1) * group] if "i" in rows else pairs
        for first in range(0, M, m.block):
            cell = part[..., first : first + m.block]
            some, every = (keys_in(words[:, :, at, n], m.block, M)[..., first] for n in (0, 1))
            assert torch.equal(some, cell.any(-1).any(-1)), (at, first)
            assert torch.equal(every, cell.all(-1).all(-1)), (at, first)


def test_blocks_are_looked_at_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every pair: at 4096 tokens as few entries as there are blocks, four times as many where they are askew."""
    looked: list[int] = []

    class Counted(Evaluator):
        def __call__(self, root: object) -> torch.Tensor:
            found = super().__call__(root)  # type: ignore[arg-type]
            looked.append(found.numel())
            return found

    monkeypatch.setattr(block_maps, "Evaluator", Counted)
    tensors = {"map": torch.ones(2, 2, 80, 80, dtype=torch.bool), "start": torch.tensor([3, 13])}
    for rows, keys, most in (
        ("i // 64", "j // 64", 4 * 64 * 64),
        ("(i + start[b] % 64) // 64", "(j + start[b] % 64) // 64", 4 * 64 * 256 * 4),
    ):
        a = longer(attention(rows, keys), 4096)
        looked.clear()
        map_tables([block_map(a.mask, a, "bits", 64)], a, tensors)
        assert sum(looked) <= most


def longer(a: Attention, n: int) -> Attention:
    text = print_attention(a).replace(f"i = {N}, j = {M}", f"i = {n}, j = {n}").replace("30, 30]", "80, 80]")
    return parse_attention(text.replace(f"2, {N}, 8]", f"2, {n}, 8]").replace(f"2, {M}, 8]", f"2, {n}, 8]"))


def test_a_map_that_begins_anywhere_bounds_the_loop() -> None:
    a = attention("(i + start[b] % 8) // 8", "(j + start[b] % 4) // 4")
    found = spanned(a, by_looking="none")
    assert [m.literal for m in found.maps] == [a.mask]
    assert all(x.bits for x in found.bounds.visit)


@pytest.mark.parametrize("columns", [1, 7, 63, 64, 65, 128, 200])
def test_bits_that_are_given_are_packed_as_those_that_are_looked_at(columns: int) -> None:
    seen = torch.rand(2, 3, columns, generator=torch.Generator().manual_seed(columns)) < 0.5
    assert torch.equal(_packed(seen), words_of(torch.stack([seen, seen], -2).to(torch.uint8), 1))
    turned = seen.permute(1, 0, 2)
    assert torch.equal(_packed(turned), _packed(turned.contiguous()))


def test_heads_in_groups_are_read_without_a_gather() -> None:
    h, g, i = (Index(n) for n in "hgi")
    source = torch.rand(2, 6, 4) < 0.5
    x = Load("m", (const(1), add(mul(h, const(3)), g), i), "bool")
    ranges = {h: (0, 2), g: (0, 3), i: (0, 4)}
    view = _view(x, source, ranges, {})
    assert view is not None and torch.equal(view, source[1].view(2, 3, 4))
    assert view.data_ptr() == source[1].data_ptr()
    assert _view(x, source, {**ranges, g: (0, 2)}, {}) is None
