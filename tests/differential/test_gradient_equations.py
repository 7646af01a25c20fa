"""The gradient of an attention, made from its expressions, is what autograd gives through the interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from gradients.equations import Equations
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_ir.programs import Program, programs

from attncc.codegen.torch_gradient import Gradients
from attncc.ir import Attention, interpret
from attncc.ir.attention_grad import AttentionGrad
from attncc.ir.build import TRUE
from attncc.passes.gradient import gradient_of

many = settings(
    max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


def both(
    a: Attention, g: AttentionGrad, tensors: dict[str, torch.Tensor], sizes: Sequence[int], wanted: Sequence[str]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The gradients by the equations, and those of the interpreter."""
    leaves = {n: t.detach().clone().requires_grad_(n in wanted) for n, t in tensors.items()}
    outputs = interpret(a, leaves, sizes)
    random = torch.Generator().manual_seed(7)
    seeds = {n: torch.randn(x.shape, generator=random, dtype=torch.float64) for n, x in outputs.items()}
    seeds = {n: torch.where(outputs[n].isfinite(), x, 0.0) for n, x in seeds.items()}
    pairs = [(outputs[n], x) for n, x in seeds.items() if outputs[n].requires_grad]
    sources = [leaves[n] for n in wanted]
    want = torch.autograd.grad(
        [o for o, _ in pairs], sources, [s for _, s in pairs], allow_unused=True, materialize_grads=True
    )
    values = {n: x.detach() for n, x in outputs.items()}
    got = Gradients(g, Equations(g))(seeds, list(tensors.values()), values, sizes, wanted)
    return got, list(want)


@many
@given(programs(dtypes=("f64",), normalizers=("softmax",), longest=12, largest_head=6), st.integers(0, 63))
def test_random_programs(program: Program, mask: int) -> None:
    a, tensors, sizes = program
    a = replace(a, outputs=("out", "lse"))
    floats = [n for n, t in tensors.items() if t.dtype == torch.float64]
    wanted = [n for at, n in enumerate(floats) if (mask >> at) & 1]
    g = gradient_of(a, wanted)
    if isinstance(g, str) or not wanted or (a.empty != "zero" and a.mask is not TRUE):
        return
    if not all(x.isfinite().all() for n, x in interpret(a, tensors, sizes).items() if n == "out"):
        return
    got, want = both(a, g, tensors, sizes, wanted)
    for n, x, y in zip(wanted, got, want, strict=True):
        assert x.shape == y.shape, n
        assert (x - y).abs().nan_to_num(0.0).max() <= 1e-11 * (1 + y.abs().max()), n
