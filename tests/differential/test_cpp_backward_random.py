"""C++ backward kernels of random attentions, against the equations in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cpp_kernels.backward import check_backward
from cpp_kernels.build import host_isas
from hypothesis import HealthCheck, given, settings
from random_ir.programs import Program, programs

from attncc.codegen.cpp import unsupported_gradient
from attncc.codegen.torch_backward import is_rough
from attncc.ir import interpret
from attncc.ir.build import TRUE
from attncc.passes.gradient import gradient_of

some = settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.full
@pytest.mark.parametrize("isa", host_isas())
@some
@given(program=programs(
    simple=True, dtypes=("f32", "bf16", "f64"), normalizers=("softmax",), longest=90, largest_head=40
))  # fmt: skip
def test_random_programs(program: Program, isa: str) -> None:
    a, tensors, sizes = program
    a = replace(a, outputs=("out", "lse"))
    g = gradient_of(a, [n for n, t in tensors.items() if t.is_floating_point()])
    if isinstance(g, str) or unsupported_gradient(g) is not None or (a.empty != "zero" and a.mask is not TRUE):
        return
    made = interpret(a, tensors, sizes)
    if not bool(made["out"].isfinite().all()) or is_rough(made["lse"]):
        return
    check_backward(g, tensors, sizes, isa)
