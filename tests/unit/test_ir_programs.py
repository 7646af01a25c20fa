"""Properties that every attention has, checked on random ones."""

from __future__ import annotations

import copy
import pickle

import torch
from hypothesis import HealthCheck, given, settings
from random_ir.programs import Program, programs

from attncc.ir import interpret, parse_attention, print_attention, verify

many = settings(
    max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@many
@given(programs())
def test_random_programs_verify_and_round_trip(program: Program) -> None:
    a = verify(program.attention)
    text = print_attention(a)
    assert parse_attention(text) == a
    assert print_attention(parse_attention(text)) == text


@many
@given(programs())
def test_random_programs_run_with_declared_shapes(program: Program) -> None:
    a, tensors, sizes = program
    result = interpret(a, tensors, sizes, compute=torch.float64)
    table = dict(zip(a.sizes, sizes, strict=True))
    shape = {x.name: table.get(x.extent) or x.extent.value for x in a.axes}
    batch = [shape[x.name] for x in a.batch]
    n, m, e = shape["i"], shape["j"], shape["e"]
    wanted = {"out": [*batch, n, e], "lse": [*batch, n], "weights": [*batch, n, m]}
    assert list(result) == list(a.outputs)
    for name, value in result.items():
        assert list(value.shape) == wanted[name]
        assert a.empty == "nan" or not value.isnan().any()


@settings(many, max_examples=30)
@given(programs())
def test_programs_survive_pickling_and_copying(program: Program) -> None:
    a = program.attention
    for twin in (pickle.loads(pickle.dumps(a)), copy.deepcopy(a)):
        assert twin == a
        assert twin.score is a.score and twin.mask is a.mask
        assert hash(twin) == hash(a)
