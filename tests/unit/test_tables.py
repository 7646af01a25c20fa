"""Kernels with tables: which calls make them, and that both kernels see what they declare."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from bounds_cases import attention, data

import attncc.tables
from attncc.codegen import torch_form
from attncc.ir import Attention, interpret
from attncc.passes.spans import spanned, tables
from attncc.tables import Tabled


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
    monkeypatch.setattr(attncc.tables, "WORTHWHILE", 1000)
    a = attention("doc[b, min(i, M - 1)] == doc[b, j] and j <= i and blocks[h, min(i // 8, 7), min(j // 8, 7)]")
    found = spanned(a, dense=False)
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
    monkeypatch.setattr(attncc.tables, "WORTHWHILE", 1000)
    a = attention("doc[b, min(i, M - 1)] == doc[b, j] and j <= i")
    found = spanned(a, dense=False)
    made: list[int] = []

    def counted(*args):  # type: ignore[no-untyped-def]
        made.append(1)
        return tables(*args)

    monkeypatch.setattr(attncc.tables, "tables", counted)
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


def test_dense_literals_get_no_map_unless_asked() -> None:
    a = attention("dense[b, i, j] and j <= i")
    found = spanned(a, dense=False)
    assert not found.maps and not found.spans and len(found.bounds.visit) == 1
    assert repr(found.bounds.visit[0].hi) == "i1"
    assert len(spanned(a).maps) == 1
