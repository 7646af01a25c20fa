"""Triton kernels of linear attention under Triton's interpreter against the recurrence. `test_triton.py` runs this
file, in its own process."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in a process of its own, from test_triton.py", allow_module_level=True)

import torch
from attentions.linear_forms import FORMS, data, plain
from triton_kernels import interpreter

from attncc.codegen.triton import LinearConfig, emit_linear, unsupported_linear
from attncc.ir import Linear, Size, interpret_linear, print_linear, verify_linear
from attncc.runtime.linear_factors import FactorKernel
from attncc.runtime.linear_op import allocate
from attncc.runtime.triton_module import load_module

FEW, MANY = 3, 37  # token by token, and three chunks, the last one in part
TAKEN = [name for name in FORMS if name not in ("features", "for_all")]


def check(a: Linear, n: int = 0) -> None:
    assert unsupported_linear(a) is None and interpreter is not None
    given, sizes = data(a, n), [n] if a.sizes else []
    tensors = [given[t.name] for t in a.tensors]
    outputs = [x.fill_(float("nan")) for x in allocate(print_linear(a), tensors, sizes)]
    FactorKernel(a, load_module(emit_linear(a, LinearConfig(precision="ieee"))).launch)(tensors, sizes, outputs)
    want = interpret_linear(a, given, sizes, compute=torch.float64)
    own = interpret_linear(a, given, sizes)
    for name, x in zip(a.outputs, outputs, strict=True):
        unit = torch.finfo(x.dtype).eps
        off = float((own[name].double() - want[name]).abs().max())
        allowed = 4 * off + 8 * unit * float(want[name].abs().max())
        assert float((x.double() - want[name]).abs().max()) <= allowed, name


@pytest.mark.parametrize("n", [FEW, MANY])
@pytest.mark.parametrize("form", TAKEN)
def test_forms(form: str, n: int) -> None:
    check(verify_linear(FORMS[form](plain(1, 2, n, 20, 37))))


def test_bf16() -> None:
    check(verify_linear(FORMS["gated_delta"](plain(1, 2, MANY, 16, 16, "bf16"))))


def test_lengths_that_the_call_decides() -> None:
    a = verify_linear(FORMS["packed"](plain(1, 2, Size("n0"), 16, 16)))
    for n in (1, 33):
        check(a, n)
