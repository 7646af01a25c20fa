"""Few queries against many keys: every number of rows, odd head sizes, keys split over threads, empty parts."""

from __future__ import annotations

import pytest
import torch
from cpp_kernels.build import check, host_isas
from cpp_kernels.cases import case, tensors_of
from parameters.thinned import thinned

ISAS = host_isas()


@pytest.fixture(autouse=True)
def two_threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("groups", "dtype", "isa"), thinned([1, 3, 4], ["f32", "bf16", "f16", "f64"], ISAS))
def test_every_number_of_rows(groups: int, dtype: str, isa: str) -> None:
    a = case("dense", dtype, groups=groups, d=64, e=64, lse=True)
    for n, m in ((1, 1), (1, 333), (2, 1500), (3, 600), (8, 130), (17, 200)):
        check(a, tensors_of(a, n, m), [n, m], isa)


WIDTHS = [(16, 16), (24, 40), (33, 17), (96, 80), (128, 128), (130, 31), (256, 72)]


@pytest.mark.parametrize(("widths", "dtype"), thinned(WIDTHS, ["f32", "bf16", "f16"]))
def test_head_sizes(widths: tuple[int, int], dtype: str) -> None:
    d, e = widths
    a = case("causal", dtype, groups=4, d=d, e=e)
    for n, m in ((1, 300), (2, 77), (5, 129)):
        check(a, tensors_of(a, n, m), [n, m], ISAS[0])


SMALL = ["length", "padding, eager's mean", "padding, eager's nan", "sinks", "bias", "softcap", "decay", "sharpened",
         "two windows"]  # fmt: skip


@pytest.mark.parametrize(("form", "dtype"), thinned(SMALL, ["f32", "bf16"]))
def test_forms(form: str, dtype: str) -> None:
    a = case(form, dtype, groups=2, d=64, e=48, lse=True)
    for n, m in ((1, 700), (4, 1100)):
        check(a, tensors_of(a, n, m), [n, m], ISAS[0])


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("what", ["climbing", "falling", "infinite", "minus infinity"])
def test_scores_that_are_hard(what: str, dtype: str) -> None:
    a = case("dense", dtype, groups=2, d=32, e=32, lse=True)
    t = tensors_of(a, 2, 900)
    ramp = torch.linspace(-1, 1, 900)[None, None, :, None]
    if what in ("climbing", "falling"):
        t["q"] = torch.ones_like(t["q"])
        t["k"] = (ramp * (200 if what == "climbing" else -200)).expand_as(t["k"]).to(t["k"].dtype).contiguous()
    else:
        t["q"] = t["q"].abs()
        t["k"][0, 0, 300 if what == "infinite" else slice(0, 500)] = torch.inf if what == "infinite" else -torch.inf
    check(a, t, [2, 900], ISAS[0])


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_an_infinite_value_stays_in_its_column(dtype: str) -> None:
    a = case("dense", dtype, groups=4, d=64, e=64)
    t = tensors_of(a, 1, 300)
    t["v"][0, 0, 100, 7], t["v"][1, 1, 299, 20] = torch.inf, -torch.inf
    out = check(a, t, [1, 300], ISAS[0])["out"]
    assert out.isinf().sum() == 8


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_keys_that_do_not_lie_behind_each_other(dtype: str) -> None:
    """(B, M, H, D) caches, one key for all, rows padded."""
    a = case("length", dtype, groups=4, d=64, e=64)
    given = tensors_of(a, 1, 300)
    for change in (
        {x: given[x].transpose(1, 2).contiguous().transpose(1, 2) for x in ("k", "v")},
        {x: given[x][:, :, :1].expand(-1, -1, 300, -1) for x in ("k", "v")},
        {x: torch.nn.functional.pad(given[x], (0, 5))[..., :-5] for x in ("k", "v")},
        {"v": given["v"].transpose(2, 3).contiguous().transpose(2, 3)},
    ):
        check(a, {**given, **change}, [1, 300], ISAS[0])
