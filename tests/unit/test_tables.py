"""Kernels with tables: which calls make them, and that both kernels see what they declare."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from masks.bounds import attention, blocks, data, tiled, visible

import attncc.kernels.skip_tables
from attncc.codegen import torch_form
from attncc.ir import Attention, interpret
from attncc.kernels.skip_tables import Tabled
from attncc.passes.bounds.block_maps import BlockMap, block_map, keys_in, map_tables
from attncc.passes.tables.spans import spanned, tables


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Many small calls take the longer the more threads meet after each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Recorded:
    """The plain-torch form of an attention, with the number of tensors each call passed."""

    def __init__(self, a: Attention) -> None:
        self.attention = a
        self.calls: list[int] = []

    def __call__(
        self, tensors: Sequence[torch.Tensor], sizes: Sequence[int], outputs: Sequence[torch.Tensor]
    ) -> None:
        self.calls.append(len(tensors))
        for out, value in zip(outputs, torch_form.run_blocked(self.attention, tensors, sizes), strict=True):
            out.copy_(value)


def test_large_calls_make_tables(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(attncc.kernels.skip_tables, "WORTHWHILE", 2000)
    a = attention("doc[b, min(i, M - 1)] == doc[b, j] and j <= i and blocks[h, min(i // 8, 7), min(j // 8, 7)]")
    found = spanned(a, by_looking="none")
    assert len(found.spans) == len(found.maps) == 1
    plain, skipping = Recorded(a), Recorded(found.attention)
    built: list[int] = []

    def build() -> Recorded:
        built.append(1)
        return skipping

    kernel = Tabled(plain, found, build)
    for n in (20, 50, 40):
        sizes = (1, n, n, 0)
        tensors = data(1, n, n)
        out = torch.empty(1, 4, n, 8)
        kernel([tensors[t.name] for t in a.tensors], sizes, [out])
        wanted = interpret(a, tensors, sizes)["out"]
        torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    assert plain.calls == [11] and skipping.calls == [13, 13] and built == [1]


def test_tables_are_made_again_only_for_other_sources(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Layers pass the same documents; a write that leaves no trace in the tensor is seen."""
    monkeypatch.setattr(attncc.kernels.skip_tables, "WORTHWHILE", 1000)
    a = attention("doc[b, min(i, M - 1)] == doc[b, j] and j <= i")
    found = spanned(a, by_looking="none")
    made: list[int] = []

    def counted(*args):  # type: ignore[no-untyped-def]
        made.append(1)
        return tables(*args)

    monkeypatch.setattr(attncc.kernels.skip_tables, "tables", counted)
    kernel = Tabled(Recorded(a), found, lambda: Recorded(found.attention))
    sizes, tensors = (1, 50, 50, 0), data(1, 50, 50)
    out = torch.empty(1, 4, 50, 8)

    def agrees() -> bool:
        kernel([tensors[t.name] for t in a.tensors], sizes, [out])
        return torch.allclose(out, interpret(a, tensors, sizes)["out"], rtol=1e-5, atol=1e-5)

    assert agrees()
    tensors["k"] = tensors["k"] * 2
    assert agrees() and len(made) == 1
    tensors["doc"].numpy()[:] = 1
    assert agrees() and len(made) == 2
    assert agrees() and len(made) == 2


def test_masks_given_as_tensors_are_looked_at_only_where_asked() -> None:
    a = attention("dense[b, i, j] and j <= i")
    found = spanned(a, by_looking="none")
    assert not found.maps and not found.spans and len(found.bounds.visit) == 1
    assert repr(found.bounds.visit[0].hi) == "i1"
    assert len(spanned(a).maps) == len(spanned(a, by_looking="quick").maps) == 1
    gathered = attention("pad[b, max(i - j, 0)] and j <= i")
    assert not spanned(gathered, by_looking="quick").maps and len(spanned(gathered).maps) == 1


def test_a_mask_that_shows_little_is_looked_at_more_and_more_rarely(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """A band of the same memory, later on, is found; a random mask is passed over for 1, 2, 4 .. calls."""
    monkeypatch.setattr(attncc.kernels.skip_tables, "WORTHWHILE", 1000)
    a, sizes, tensors = attention("dense[b, i, j] and j <= i"), (1, 300, 300, 0), data(1, 300, 300)
    found = spanned(a, by_looking="quick")
    plain, skipping = Recorded(a), Recorded(found.attention)
    kernel = Tabled(plain, found, lambda: skipping)
    looked: list[int] = []

    def counted(*args):  # type: ignore[no-untyped-def]
        looked.append(len(plain.calls))
        return map_tables(*args)

    monkeypatch.setattr(attncc.kernels.skip_tables, "map_tables", counted)
    out = torch.empty(1, 4, 300, 8)

    def run() -> None:
        kernel([tensors[t.name] for t in a.tensors], sizes, [out])
        wanted = interpret(a, tensors, sizes)["out"]
        torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)

    for _ in range(9):
        run()
    assert looked == [0, 2, 5] and not skipping.calls
    i = torch.arange(300)
    tensors["dense"].copy_((i[:, None] - i).abs() < 9)
    for _ in range(3):
        run()
    assert looked == [0, 2, 5, 10, 10] and len(skipping.calls) == 2


def test_a_mask_that_stays_the_same_is_compared_and_not_looked_at(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Any mask is, wherever it lies; a write is found in the very next call, whatever left no trace."""
    monkeypatch.setattr(attncc.kernels.skip_tables, "WORTHWHILE", 1000)
    a, sizes, tensors = attention("dense[b, i, j]"), (1, 300, 300, 0), data(1, 300, 300)
    i = torch.arange(300)
    tensors["dense"] = (i[:, None] - i).abs()[None] < 20
    found = spanned(a, by_looking="quick")
    kernel = Tabled(Recorded(a), found, lambda: Recorded(found.attention))
    looked: list[int] = []

    def counted(*args):  # type: ignore[no-untyped-def]
        looked.append(1)
        return map_tables(*args)

    monkeypatch.setattr(attncc.kernels.skip_tables, "map_tables", counted)
    out = torch.empty(1, 4, 300, 8)

    def calls(n: int) -> int:
        looked.clear()
        for _ in range(n):
            kernel([tensors[t.name] for t in a.tensors], sizes, [out])
            torch.testing.assert_close(out, interpret(a, tensors, sizes)["out"], rtol=1e-5, atol=1e-5)
        return len(looked)

    assert calls(9) == 3
    tensors["dense"].numpy()[:, 100:110, 200:] = True
    assert calls(9) == 4  # looked at for longer, after a copy that was in vain
    tensors["dense"].data[:, 200, 100] = True
    assert calls(20) == 6
    for at in range(12):
        tensors["dense"].data[:, at, 150] = True
        assert calls(1) == 1
    tensors["dense"] = tensors["dense"].clone()
    assert calls(9) == 3


def test_threads_with_masks_of_their_own(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Of documents and pairs, some worth a table and some not, at places that threads share."""
    monkeypatch.setattr(attncc.kernels.skip_tables, "WORTHWHILE", 1000)
    a, sizes = attention("dense[b, i, j] and doc[b, min(i, M - 1)] == doc[b, j]"), (1, 128, 128, 0)
    found = spanned(a, by_looking="quick")
    kernel = Tabled(Recorded(a), found, lambda: Recorded(found.attention))
    i = torch.arange(128)
    shared = [torch.ones(1, 128, 128, dtype=torch.bool), torch.rand(1, 128, 128) > 0.5, (i[:, None] >= i)[None]]

    def run(seed: int) -> list[float]:
        errors: list[float] = []
        for n in range(12):
            tensors = data(1, 128, 128, seed=seed)
            tensors["dense"] = shared[(n + seed) % 3] if seed % 2 else ((i[:, None] - i).abs() < 9 + n // 4)[None]
            out = torch.empty(1, 4, 128, 8)
            kernel([tensors[t.name] for t in a.tensors], sizes, [out])
            errors.append(float((out - interpret(a, tensors, sizes)["out"]).abs().max()))
        return errors

    with ThreadPoolExecutor(8) as pool:
        for seed, errors in enumerate(pool.map(run, range(16))):
            assert max(errors) < 1e-5, f"thread of seed {seed}"
    assert all(place.rest >= 0 for place in kernel._places.values())


def test_a_mask_is_looked_at_again_whatever_threads_do_to_the_count(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Two threads read the count of one rest that is left, and both take one off."""
    monkeypatch.setattr(attncc.kernels.skip_tables, "WORTHWHILE", 1000)
    a, sizes, tensors = attention("dense[b, i, j]"), (1, 300, 300, 0), data(1, 300, 300)
    found = spanned(a, by_looking="quick")
    plain = Recorded(a)
    kernel = Tabled(plain, found, lambda: Recorded(found.attention))
    out = torch.empty(1, 4, 300, 8)
    given = [tensors[t.name] for t in a.tensors]
    kernel(given, sizes, [out])  # shows little: one rest
    at = (tensors["dense"].data_ptr(),)
    both = threading.Barrier(2)

    class Slow(dict[tuple[int, ...], object]):
        def get(self, key, default=None):  # type: ignore[no-untyped-def]
            value = super().get(key, default)
            if threading.current_thread() is not threading.main_thread():
                both.wait(10)
            return value

    kernel._places = Slow(kernel._places)  # type: ignore[assignment]
    threads = [threading.Thread(target=kernel, args=(given, sizes, [torch.empty_like(out)])) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert kernel._places[at].rest == 0
    tensors["dense"].copy_((torch.arange(300)[:, None] - torch.arange(300)).abs() < 9)
    plain.calls.clear()
    kernel(given, sizes, [out])
    assert not plain.calls  # it was looked at


@pytest.mark.parametrize(
    "literal",
    ["dense[b, i, j]", "not dense[b, i, j]", "float(doc[b, j]) < float(pos[i])", "dense[b, i, j + 3]",
     "float(dense[b, i, j]) != 0.0", "not float(dense[b, i, j]) < 0.5", "dense[0, i + 2, j]", "dense[b, j, i]",
     "float(start[b, i]) * 0.5 <= float(doc[b, j])"],
)  # fmt: skip
def test_maps_against_the_mask(literal: str) -> None:
    """By views of tensors of any strides, and by results of comparisons in floats."""
    sizes, (b, n, m) = (2, 70, 130, 0), (2, 70, 130)
    a, tensors = attention(literal), data(b, n + 9, m + 9)
    dense = torch.rand(2, 150, 150, generator=torch.Generator().manual_seed(1)) > 0.5
    for at, value in ((32, True), (90, False)):
        dense[:, :80, at : at + 40] = dense[:, at : at + 40, :80] = value
    tensors["dense"] = dense.mT
    (found,) = block_maps(a)
    words = map_tables([found], a, tensors, sizes)[found.tensor.name]
    mask = visible(a, sizes, tensors)[:, 0]
    for at, how in enumerate(("any", "all")):
        wanted = blocks(tiled(mask, 64, how), found.block, how)
        got = blocks(keys_in(words[..., at, :], found.block, m), found.block)
        assert torch.equal(got.expand_as(wanted), wanted)
        assert "dense" not in literal or (wanted.any() and not wanted.all())


def block_maps(a: Attention) -> list[BlockMap]:
    return [block_map(a.mask, a, "map", 64)]
