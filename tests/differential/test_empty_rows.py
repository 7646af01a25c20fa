"""Rows that see no key, in every kind of mask: kernels and the plain-torch form give what the interpreter gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cpp_kernels.build import check, compare, host_isas
from masks.catalogue import CATALOGUE, N

from attncc.codegen.torch_form import run_blocked
from attncc.ir import Attention, interpret, parse_expr, print_expr, verify
from attncc.passes.bounds.bounds import loop_bounds
from attncc.passes.tables.spans import spanned, tables

#: Rows spread over tiles, whole tiles, and those of the last one.
HIDDEN = f"(i % 64 < 3 or (60 <= i and i < 140) or {N - 5} <= i)"
EMPTIES = ("zero", "mean", "nan")
QUICK = ("2 causal", "4 causal documents", "13 uniform blocks", "15 neighbourhood, dilated", "17 S2", "23 pages",
         "29 left padding", "33 static cache")  # fmt: skip
BUILT = pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[] if x in QUICK else pytest.mark.full) for x in CATALOGUE]
)


def with_hidden_rows(name: str, empty: str) -> Attention:
    a = CATALOGUE[name].attention()
    kinds = {t.name: t.kind for t in a.tensors}
    names = {x.name: x.index for x in a.axes}
    mask = parse_expr(f"({print_expr(a.mask)}) and not {HIDDEN}", names, kinds)
    return verify(replace(a, mask=mask, empty=empty, outputs=("out", "lse")))  # type: ignore[arg-type]


def test_the_rows_are_empty_and_others_are_not() -> None:
    a = with_hidden_rows("2 causal", "zero")
    out = interpret(a, CATALOGUE["2 causal"].tensors())["out"]
    empty = (out == 0).all(-1)[0, 0]
    assert empty[:3].all() and empty[60:140].all() and empty[-5:].all() and not empty[10:60].any()


@BUILT
@pytest.mark.parametrize("empty", EMPTIES)
def test_blocks_of_the_torch_form(name: str, empty: str) -> None:
    a, tensors = with_hidden_rows(name, empty), CATALOGUE[name].tensors()
    given = [tensors[t.name] for t in a.tensors]
    got = run_blocked(a, given, [], budget=1 << 17, bounds=loop_bounds(a, rows=True))
    compare(a, tensors, [], dict(zip(a.outputs, got, strict=True)))


@BUILT
def test_kernels(name: str) -> None:
    empty = EMPTIES[sorted(CATALOGUE).index(name) % 3]
    a, tensors = with_hidden_rows(name, empty), CATALOGUE[name].tensors()
    found = spanned(a)
    check(found.attention, tensors | tables(found, tensors), [], host_isas()[0], found.bounds)


@pytest.mark.parametrize("name", ["2 causal", "6 window", "17 S2", "3 documents"])
def test_gradients_through_blocks_that_skip(name: str) -> None:
    a, tensors = with_hidden_rows(name, "mean" if name == "2 causal" else "zero"), CATALOGUE[name].tensors()
    a = replace(a, outputs=("out",))

    def gradients(**options: object) -> list[torch.Tensor]:
        leaves = {k: x.clone().double().requires_grad_() if k in "qkv" else x for k, x in tensors.items()}
        declared = tuple(replace(t, dtype="f64") if t.name in "qkv" else t for t in a.tensors)
        wide, given = replace(a, tensors=declared, dtype="f64"), [leaves[t.name] for t in a.tensors]
        (out,) = run_blocked(wide, given, [], budget=1 << 17, **options)  # type: ignore[arg-type]
        return list(torch.autograd.grad(out.sin().sum(), [leaves[x] for x in "qkv"]))

    for skipped, whole in zip(gradients(bounds=loop_bounds(a, rows=True)), gradients(), strict=True):
        torch.testing.assert_close(skipped, whole, rtol=1e-10, atol=1e-12)
