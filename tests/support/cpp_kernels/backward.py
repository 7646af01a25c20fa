"""Building and running C++ backward kernels in tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attncc.codegen.cpp import emit_gradient
from attncc.ir import Attention, interpret
from attncc.ir.attention_grad import AttentionGrad, interpret_grad, shapes_of_grad
from attncc.ir.evaluate import DTYPE_OF
from attncc.kernels.first_gradient import size_of_terms
from attncc.kernels.gradients import ranks_of
from attncc.passes.bounds.bounds import loop_bounds
from attncc.passes.gradient import gradient_of
from attncc.runtime.cpp import CppKernel
from cpp_kernels.build import compiled


def gradient(a: Attention, wanted: Sequence[str] | None = None) -> AttentionGrad:
    """The gradient of `a` for all its tensors of floats, or for some."""
    found = gradient_of(a, [t.name for t in a.tensors if t.kind == "float"] if wanted is None else wanted)
    assert not isinstance(found, str), found
    return found


def build_backward(g: AttentionGrad, isa: str) -> CppKernel:
    return CppKernel(compiled(emit_gradient(g, loop_bounds(g.by_key, rows=True), isa), isa, quick=False), ranks_of(g))


def given_of(a: Attention, tensors: dict[str, torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
    """What a backward is given beside its tensors: random gradients, and what the forward kept."""
    made = interpret(a, tensors, sizes)
    random = torch.Generator().manual_seed(5)
    grads = {n: torch.randn(x.shape, generator=random).to(x.dtype) for n, x in made.items()}
    return [grads["out"], made["out"], made["lse"], grads["lse"]]


def run_backward(
    g: AttentionGrad, tensors: dict[str, torch.Tensor], given: Sequence[torch.Tensor], sizes: Sequence[int], isa: str
) -> list[torch.Tensor]:
    """What the kernel gives."""
    outputs = empty_outputs(g, sizes)
    build_backward(g, isa)([tensors[t.name] for t in g.attention.tensors] + list(given), sizes, outputs)
    return outputs


def empty_outputs(g: AttentionGrad, sizes: Sequence[int]) -> list[torch.Tensor]:
    """Where a kernel writes: full of NaN, so that what is not written shows."""
    dtype = DTYPE_OF[g.attention.compute_dtype]
    outputs = [torch.full(shape, float("nan"), dtype=dtype) for shape in shapes_of_grad(g, sizes)]
    for out, x in zip(outputs[len(g.operands) :], g.loads, strict=True):
        if x.over == "i, j":
            out.zero_()  # what no tile visits is not written
    return outputs


def check_backward(g: AttentionGrad, tensors: dict[str, torch.Tensor], sizes: Sequence[int], isa: str) -> None:
    """Runs the kernel and holds it against the equations in float64: at most twice what the equations are off in the
    attention's own compute type, and a few roundings; of bfloat16 where products run in it."""
    given = given_of(g.attention, tensors, sizes)
    hold(g, tensors, given, sizes, run_backward(g, tensors, given, sizes, isa), isa)


def hold(
    g: AttentionGrad, tensors: dict[str, torch.Tensor], given: Sequence[torch.Tensor], sizes: Sequence[int],
    got: Sequence[torch.Tensor], isa: str,
) -> None:  # fmt: skip
    """The comparison of `check_backward`."""
    want = interpret_grad(g, tensors, given, sizes, compute=torch.float64)
    own = interpret_grad(g, tensors, given, sizes)
    operands = {g.attention.tensor(x.tensor).dtype for x in (g.attention.q, g.attention.k, g.attention.v)}
    halves = operands == {"bf16"} and isa == "amx"
    least = 8 * torch.finfo(DTYPE_OF[g.attention.compute_dtype]).eps * size_of_terms(g, [*tensors.values(), *given])
    names = [*g.operands, *(repr(x.load) for x in g.loads)]
    for name, x, w, e in zip(names, got, want, own, strict=True):
        unit = torch.finfo(torch.bfloat16 if halves else DTYPE_OF[g.attention.compute_dtype]).eps
        scale = float(w.abs().max())
        error, eager = float((x.double() - w).abs().max()), float((e.double() - w).abs().max())
        assert error <= 2 * eager + 20 * unit * scale + least, (
            f"{name}: error {error}, the equations' {eager}, scale {scale}"
        )
