"""C++ kernels of the forms models use, on every instruction set here, against the interpreter."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cpp_kernels.build import check, compare, host_isas, toolchain
from cpp_kernels.cases import FORMS, case, tensors_of
from parameters.thinned import thinned

from attncc.codegen.cpp import emit
from attncc.ir import Attention
from attncc.ir.bounds import unskipped
from attncc.ir.evaluate import DTYPE_OF
from attncc.passes.bounds.bounds import loop_bounds
from attncc.runtime.cpp import CppKernel


def agrees(a: Attention, n: int, m: int, isa: str) -> None:
    check(a, tensors_of(a, n, m), [n, m], isa)


ISAS = host_isas()


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str) -> None:
    a = case(form, lse=FORMS[form].get("norm", "softmax") == "softmax")
    for n, m in ((70, 70), (1, 70), (33, 150)):
        if "doc" not in [t.name for t in a.tensors] or n <= m:
            agrees(a, n, m, ISAS[0])


@pytest.mark.parametrize("form", ["relative table", "decay"])
def test_distances_where_lanes_are_rows_of_two_groups(form: str) -> None:
    a = case(form)
    for n, m in ((20, 130), (9, 9)):
        agrees(a, n, m, ISAS[0])


@pytest.mark.parametrize(("form", "dtype", "isa"), thinned(["dense", "window"], ["bf16", "f16", "f64"], ISAS))
def test_types(form: str, dtype: str, isa: str) -> None:
    a = case(form, dtype, lse=True)
    for n, m in ((100, 100), (3, 300), (130, 17)):
        agrees(a, n, m, isa)


WIDTHS = [(1, 1), (4, 9), (17, 64), (40, 24), (80, 80), (96, 33), (256, 256), (512, 8)]


@pytest.mark.parametrize(("widths", "dtype"), thinned(WIDTHS, ["f32", "bf16"]))
def test_head_sizes(widths: tuple[int, int], dtype: str) -> None:
    d, e = widths
    agrees(case("causal", dtype, d=d, e=e), 70, 90, ISAS[0])


@pytest.mark.parametrize(("form", "dtype"), thinned(["dense", "causal", "sinks", "window", "bias"], ["f32", "bf16"]))
def test_threads_and_split_keys(form: str, dtype: str, threads: int) -> None:
    a = case(form, dtype, groups=4, lse=True)
    for n, m in ((1, 5000), (5, 3001), (700, 700)):
        agrees(a, n, m, ISAS[0])


@pytest.mark.full
@pytest.mark.parametrize("isa", host_isas(every=True))
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16", "f64"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_everywhere(form: str, dtype: str, isa: str) -> None:
    agrees(case(form, dtype), 133, 133, isa)


@pytest.mark.parametrize("n, m", [(0, 5), (5, 0), (0, 0)])
def test_no_rows_no_keys(n: int, m: int) -> None:
    for form in ("dense", "padding, eager's nan"):
        agrees(case(form), n, m, ISAS[0])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_strides(dtype: str, isa: str) -> None:
    """Channels first, every other key, rows backwards in memory, one value for all rows: no layout is special."""
    a = case("causal", dtype)
    given = tensors_of(a, 90, 90)
    for change in (
        {"k": given["k"].transpose(2, 3).contiguous().transpose(2, 3)},
        {"k": given["k"].repeat_interleave(2, 2)[:, :, ::2], "v": given["v"].repeat_interleave(2, 3)[..., ::2]},
        {"v": given["v"].transpose(1, 2).contiguous().transpose(1, 2)},
        {"q": given["q"].flip(1).contiguous().flip(1), "k": given["k"][:1].expand(2, -1, -1, -1)},
        {"v": given["v"][:, :, :1].expand(-1, -1, 90, -1)},
        {"q": torch.nn.functional.pad(given["q"], (0, 3))[..., :-3]},
    ):
        check(a, {**given, **change}, [90, 90], isa)


HARD = ["climbing", "falling", "huge", "tiny", "infinite"]


@pytest.mark.parametrize(("what", "dtype", "isa"), thinned(HARD, ["f32", "bf16"], ISAS))
def test_scores_that_are_hard(what: str, dtype: str, isa: str) -> None:
    a = case("dense", dtype, lse=True)
    t = tensors_of(a, 40, 600)
    ramp = torch.linspace(-1, 1, 600)[None, None, :, None]
    if what in ("climbing", "falling"):
        t["q"] = torch.ones_like(t["q"])
        t["k"] = (ramp * (200 if what == "climbing" else -200)).expand_as(t["k"]).to(t["k"].dtype).contiguous()
    elif what == "huge":
        t["k"] = torch.sign(t["k"]) * 1e4
    elif what == "tiny":
        t["k"], t["v"] = t["k"] * 1e-30, t["v"] * 1e-36
    else:
        t["q"] = t["q"].abs()
        t["k"][0, 0, 300] = math.inf
    check(a, t, [40, 600], isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_hidden_keys_may_hold_anything(dtype: str, isa: str) -> None:
    a = case("padding", dtype)
    t = tensors_of(a, 40, 100)
    t["k"][0, :, 97:], t["k"][0, :, 96] = math.nan, math.inf
    assert torch.isfinite(check(a, t, [40, 100], isa, unskipped(a.j.extent))["out"]).all()


def test_longer_lanes_where_integers_are_wide() -> None:
    """Positions that do not fit 32 bits are compared in 64."""
    a = case("documents")
    t = tensors_of(a, 50, 50)
    t["doc"] = t["doc"] * 2**32 + 5
    check(a, t, [50, 50], ISAS[0])


@pytest.mark.parametrize(("form", "dtype"), thinned(["causal", "documents", "bias"], ["f32", "bf16", "f64"]))
def test_the_narrow_skeleton_of_neon_by_the_hosts_compiler(form: str, dtype: str, tmp_path: Path) -> None:
    """NEON's source has no instruction of its own but the half type: the host runs it in 16-byte vectors."""
    a = case(form, dtype)
    source = emit(a, loop_bounds(a), "neon").replace("__fp16", "_Float16")
    toolchain().compile(source, "avx2", tmp_path / "narrow.so")
    t = tensors_of(a, 70, 70)
    out = torch.empty(2, 2, 2, 70, 32, dtype=DTYPE_OF[dtype])
    CppKernel(tmp_path / "narrow.so", a)([t[x.name] for x in a.tensors], [70, 70], [out])
    compare(a, t, [70, 70], {"out": out})
