"""The NEON kernels, cross-compiled and run under emulation, against the interpreter.

They are skipped where Debian's g++-aarch64-linux-gnu or qemu-user is not installed; docs/adding-a-target.md."""

from __future__ import annotations

import pytest
import torch
from cpp_kernels.backward import gradient
from cpp_kernels.cases import FORMS, case, tensors_of
from cpp_kernels.emulated import check_backward_emulated, check_emulated
from hypothesis import HealthCheck, given, settings
from random_ir.programs import Program, programs

from attncc.codegen.cpp import unsupported

SHAPES = ((37, 37), (1, 70), (5, 150))


def agrees(form: str, dtype: str, *, groups: int = 2, d: int = 32, e: int = 32,
           shapes: tuple[tuple[int, int], ...] = SHAPES, threads: int = 1) -> None:  # fmt: skip
    softmax = FORMS[form].get("norm", "softmax") == "softmax"
    a = case(form, dtype, groups=groups, d=d, e=e, lse=softmax)
    for n, m in shapes:
        check_emulated(a, tensors_of(a, n, m), [n, m], threads)


@pytest.mark.parametrize(
    ("form", "dtype"),
    [("dense", "f32"), ("causal", "bf16"), ("window", "f16"), ("bias", "f32"), ("documents", "bf16"),
     ("softcap", "f16"), ("alibi", "f32"), ("padding, eager's nan", "f32"), ("sinks", "bf16")],
)  # fmt: skip
def test_forms(form: str, dtype: str) -> None:
    agrees(form, dtype, shapes=SHAPES[:2] if form == "documents" else SHAPES)


@pytest.mark.parametrize(("d", "e", "dtype"), [(4, 9, "bf16"), (17, 64, "f16"), (96, 33, "f32")])
def test_head_sizes(d: int, e: int, dtype: str) -> None:
    agrees("causal", dtype, d=d, e=e)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_decode_with_split_keys(dtype: str) -> None:
    agrees("dense", dtype, groups=4, d=64, e=64, shapes=((1, 1200), (3, 1100)), threads=2)


def test_strides() -> None:
    a = case("causal", "f16")
    t = tensors_of(a, 40, 40)
    t["k"] = t["k"].transpose(2, 3).contiguous().transpose(2, 3)
    t["v"] = t["v"].repeat_interleave(2, 2)[:, :, ::2]
    t["q"] = torch.nn.functional.pad(t["q"], (0, 3))[..., :-3]
    check_emulated(a, t, [40, 40])


def test_no_rows_no_keys() -> None:
    agrees("dense", "f32", shapes=((0, 5), (5, 0)))


BACKWARD = [("causal", "bf16"), ("relative table", "f32")]


@pytest.mark.parametrize(("form", "dtype"), BACKWARD)
def test_backward(form: str, dtype: str) -> None:
    a = case(form, dtype, lse=True)
    for n, m in ((37, 37), (5, 90)):
        check_backward_emulated(gradient(a), tensors_of(a, n, m), [n, m])


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16", "f64"])
@pytest.mark.parametrize("form", [
    "dense", "window", "documents", "padding", "alibi", "softcap", "sinks", "decay", "dropout"])
def test_backward_of_more_forms(form: str, dtype: str) -> None:
    a = case(form, dtype, lse=True)
    check_backward_emulated(gradient(a), tensors_of(a, 70, 90), [70, 90], threads=2)


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16", "f64"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form(form: str, dtype: str) -> None:
    agrees(form, dtype, shapes=((70, 70), (1, 70)))


@pytest.mark.full
@settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(programs(outputs=("out", "lse")))
def test_random_attentions(program: Program) -> None:
    if unsupported(program[0]) is None:
        check_emulated(*program)
