"""C++ kernels of the gradient of linear attention against that of the recurrence in float64: as near as torch's of the
exact form by chunks in float32 is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from attentions.linear_forms import FORMS, data, plain
from cpp_kernels.build import compiled, host_isas

from attncc.codegen.cpp import emit_linear_gradient, unsupported_linear_gradient
from attncc.codegen.cpp.linear_gradient import GIVES, SIZES, TAKES
from attncc.ir import Index, Linear, Size, interpret_linear, verify_linear
from attncc.ir.build import op
from attncc.ir.evaluate import DTYPE_OF
from attncc.ir.linear_chunks import by_chunks
from attncc.runtime.cpp import CppKernel, Ranks
from attncc.runtime.linear_factors import gradients

SHAPE = (2, 4, 45, 20, 37)  # batch, heads, tokens, channels of keys and of values: no multiple of any vector or chunk
TAKEN = [name for name in FORMS if name not in ("features", "for_all")]


def kernel_of(a: Linear, isa: str) -> CppKernel:
    takes = Ranks(tuple(n for _, n in TAKES), len(SIZES), tuple(n for _, n in GIVES))
    return CppKernel(compiled(emit_linear_gradient(a, isa), isa), takes)


def seeds(a: Linear, tensors: dict[str, torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    outputs = interpret_linear(a, tensors, sizes, compute=torch.float64)
    return [torch.randn(outputs[n].shape, generator=generator, dtype=torch.float64) for n in a.outputs]


def by_torch(
    run: object, a: Linear, tensors: dict[str, torch.Tensor], given: list[torch.Tensor], sizes: Sequence[int],
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:  # fmt: skip
    leaves = {n: x.detach().to(dtype).requires_grad_() if x.is_floating_point() else x for n, x in tensors.items()}
    outputs = run(a, leaves, sizes, compute=dtype)  # type: ignore[operator]
    sources = {n: x for n, x in leaves.items() if x.requires_grad}
    found = torch.autograd.grad([outputs[n] for n in a.outputs], list(sources.values()), [g.to(dtype) for g in given])
    return dict(zip(sources, found, strict=True))


def check(a: Linear, isa: str, sizes: tuple[int, ...] = (), tensors: dict[str, torch.Tensor] | None = None) -> None:
    tensors = data(a, *sizes) if tensors is None else tensors
    given = seeds(a, tensors, sizes)
    exact = by_torch(interpret_linear, a, tensors, given, sizes, torch.float64)
    plain = by_torch(by_chunks, a, tensors, given, sizes, DTYPE_OF[a.compute_dtype])
    wanted = [t.name in exact for t in a.tensors]
    kinds = {"out": DTYPE_OF[a.dtype], "state": DTYPE_OF[a.compute_dtype]}
    outs = [g.to(kinds[n]) for n, g in zip(a.outputs, given, strict=True)]
    got = gradients(a, kernel_of(a, isa), outs, [tensors[t.name] for t in a.tensors], sizes, wanted)
    for name, x in zip(exact, got, strict=True):
        want, own = exact[name], plain[name].double()
        unit = max(torch.finfo(x.dtype).eps, torch.finfo(outs[0].dtype).eps)
        allowed = 2 * float((own - want).abs().max()) + 4 * unit * float(want.abs().max())
        assert x.dtype == tensors[name].dtype
        assert float((x.double() - want).abs().max()) <= allowed, name


_QUICK = ("grouped", "by_channel")
_CASES = [
    pytest.param(form, isa, marks=() if form in _QUICK and at == 0 else pytest.mark.full)
    for form in TAKEN for at, isa in enumerate(host_isas())
]  # fmt: skip


@pytest.mark.parametrize(("form", "isa"), _CASES)
def test_forms(form: str, isa: str) -> None:
    check(verify_linear(FORMS[form](plain(*SHAPE))), isa)


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("f64", marks=pytest.mark.full)])
def test_types(dtype: str) -> None:
    check(verify_linear(FORMS["gated_delta"](plain(*SHAPE, dtype))), host_isas()[0])


@pytest.mark.parametrize("n", [1, 33, 64])
def test_lengths_that_the_call_decides(n: int) -> None:
    a = verify_linear(FORMS["packed"](plain(2, 4, Size("n0"), 20, 37)))
    check(a, host_isas()[0], (n,))


@pytest.mark.parametrize("form", ["gated_delta", "by_channel"])
def test_strong_decays_do_not_overflow(form: str) -> None:
    a = verify_linear(FORMS[form](plain(*SHAPE)))
    check(a, host_isas()[0], tensors={n: x * 100 if n in ("g", "gk") else x for n, x in data(a).items()})


@pytest.mark.parametrize("form", ["gated", "by_channel", "gated_delta", "delta_by_channel"])
def test_gradients_of_strong_decays_are_no_differences(form: str) -> None:
    """What little goes over a strong decay has its own digits, and not those of what goes past it."""
    a = verify_linear(FORMS[form](plain(*SHAPE)))
    log = next(t.name for t in a.tensors if t.name in ("g", "gk"))
    tensors = {n: x * 10 if n == log else x for n, x in data(a).items()}
    given = seeds(a, tensors, ())
    exact = by_torch(interpret_linear, a, tensors, given, (), torch.float64)[log]
    outs = [g.to(torch.float32) for g in given]
    wanted = [t.name == log for t in a.tensors]
    (got,) = gradients(a, kernel_of(a, host_isas()[0]), outs, [tensors[t.name] for t in a.tensors], (), wanted)
    relative = ((got.double() - exact).abs() / exact.abs()).nan_to_num()
    assert float(exact.abs().median()) < 1e-3 * float(exact.abs().max())
    assert float(relative.median()) < 1e-6


@pytest.mark.full
@pytest.mark.parametrize("form", ["gated", "delta_by_channel"])
def test_long_memories(form: str) -> None:
    """Decays near one over many chunks: what a token gets from tokens far behind it."""
    a = verify_linear(FORMS[form](plain(1, 2, 1500, 16, 16)))
    given = {n: x * 2e-3 if n in ("g", "gk") else x for n, x in data(a).items()}
    check(a, host_isas()[0], tensors=given)


@pytest.mark.parametrize(
    ("form", "change", "reason"),
    [
        ("features", {}, "quotient"),
        ("for_all", {}, "every query"),
        ("gated", {"rate": op("float", Index("d"))}, "a rate for each channel"),
        ("gated", {"decay": op("exp", op("float", Index("e")))}, "for each column"),
    ],
)
def test_what_has_no_kernel(form: str, change: dict[str, object], reason: str) -> None:
    a = replace(FORMS[form](plain(*SHAPE)), **change)  # type: ignore[arg-type]
    assert reason in str(unsupported_linear_gradient(a))
    with pytest.raises(ValueError, match=reason):
        emit_linear_gradient(a, "avx2")
