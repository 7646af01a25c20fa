"""C++ kernels of random attentions give what the interpreter gives."""

from __future__ import annotations

import pytest
from cpp_kernels.build import check, host_isas
from hypothesis import HealthCheck, given, seed, settings
from random_ir.programs import Program, programs

from attncc.codegen.cpp import unsupported

some = settings(
    max_examples=15, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
ISAS = host_isas()


def holds(program: Program, isa: str) -> None:
    if unsupported(program.attention) is None:
        check(*program, isa)


@pytest.mark.parametrize("isa", ISAS[:1])
@some
@given(programs(outputs=("out", "lse")))
def test_the_best_instruction_set_equals_the_interpreter(isa: str, program: Program) -> None:
    holds(program, isa)


@pytest.mark.parametrize("isa", ISAS[1:])
@settings(some, max_examples=6)
@given(programs(outputs=("out", "lse")))
def test_every_instruction_set_equals_the_interpreter(isa: str, program: Program) -> None:
    holds(program, isa)


@pytest.mark.full
@pytest.mark.parametrize("part", range(16))
@pytest.mark.parametrize("isa", host_isas(every=True))
def test_many_and_longer(isa: str, part: int) -> None:
    """Another twelve in each part, so that parts of the week are about as long."""

    @seed(part)
    @settings(some, max_examples=12, derandomize=False)
    @given(programs(outputs=("out", "lse"), longest=200, largest_head=80))
    def each(program: Program) -> None:
        holds(program, isa)

    each()
