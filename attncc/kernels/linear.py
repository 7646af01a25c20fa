"""From a linear attention to a kernel, and the check of it at its first use on a machine.

What a token gives depends on the tokens before it alone, so that a kernel is held against the recurrence in float64 on
its first tokens where all of them are too many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from math import prod

import torch

from attncc.codegen import cpp, triton
from attncc.ir import Axis, Const, Linear, interpret_linear, kind_of, print_linear
from attncc.ir.evaluate import DTYPE_OF, int_value
from attncc.ir.expr import Expr, loads
from attncc.kernels.build import Built, Target, default_store, target_of
from attncc.kernels.compiled import NOT_MADE, compiled, why_not_made
from attncc.kernels.first_use import Check, CheckedAtFirst, Untried
from attncc.runtime.cpp import CppKernelError, Ranks
from attncc.runtime.linear_factors import FactorKernel
from attncc.runtime.linear_op import allocate, linear_of, portable
from attncc.runtime.op import Kernel
from attncc.runtime.triton_launch import TritonKernel
from attncc.torch_private import apart

#: Tokens of a trial, and multiplications of a kernel that is tried on made-up data.
_TOKENS, _MOST_WORK = 40, 1 << 31


class PortableKernel:
    """The plain-torch form, for devices, forms and machines that have nothing better."""

    def __init__(self, a: Linear) -> None:
        self.linear = a

    def __call__(
        self, tensors: Sequence[torch.Tensor], sizes: Sequence[int], outputs: Sequence[torch.Tensor]
    ) -> None:
        for out, value in zip(outputs, portable(self.linear, tensors, sizes), strict=True):
            out.copy_(value)


def build_linear(spec: str, device: torch.device) -> Kernel:
    """The kernel of a linear attention on a device, for `attncc.runtime.linear_op`."""
    return built_linear(spec, str(device)).kernel


def built_linear(spec: str, device: str) -> Built:
    """The kernel of a spec, compiled and kept in the store; where it cannot be, the plain-torch form and the reason."""
    return _built(spec, target_of(torch.device(device)))


@lru_cache(maxsize=1024)
def _built(spec: str, target: Target) -> Built:
    a = linear_of(spec)
    if target.device == "cuda" and not target.missing:
        return _triton(a, target)
    reason = target.missing or cpp.unsupported_linear(a)
    if target.device != "cpu" and not reason:
        reason = f"no kernels of linear attention for device {target.device}"
    if reason:
        return _portable(a, reason)
    assert target.toolchain is not None  # else the target would lack it
    with torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
        try:
            source = cpp.emit_linear(a, target.arch)
            kernel = compiled(
                _ranks(a), source, target.arch, target.toolchain, kernel_name(a), default_store(),
                Check(partial(_wrong, a), partial(_differs, a)), partial(PortableKernel, a), None,
            )  # fmt: skip
        except NOT_MADE as error:
            return _portable(a, why_not_made(error))
    isa = "avx512" if target.arch in ("amx", "avx512bf16") else target.arch  # products run in the compute type
    return Built(kernel, source, "cpp", f"C++ {isa} kernel", note=target.toolchain.note, isa=isa)


def _triton(a: Linear, target: Target) -> Built:
    reason = triton.unsupported_linear(a)
    if reason:
        return _portable(a, reason)
    amd = target.arch.startswith("gfx")
    source = triton.emit_linear(a, triton.LinearConfig(precision="ieee" if amd else "tf32x3"))
    kernel = FactorKernel(a, TritonKernel([source]))
    held = CheckedAtFirst(kernel, partial(_differs, a), lambda why: PortableKernel(a) if why else kernel)
    return Built(held, source, "triton", f"Triton {target.arch} kernel", isa=target.arch)


def _portable(a: Linear, reason: str) -> Built:
    return Built(PortableKernel(a), print_linear(a), "torch", "plain torch", reason)


def kernel_name(a: Linear) -> str:
    """A readable name: `linear-delta-f32-d64`."""
    return f"linear-{a.rule}-{a.tensor(a.q.tensor).dtype}-d{a.d.extent!r}"


def _ranks(a: Linear) -> Ranks:
    outputs = tuple(len(t.shape) for t in kind_of(a).gives(a))
    return Ranks(tuple(len(t.shape) for t in a.tensors), len(a.sizes), outputs)


def _wrong(a: Linear, kernel: Kernel) -> str | None:
    """What is wrong with a kernel of `a` on made-up data, nothing if it is right. Raises Untried."""
    with apart():
        sizes = [_TOKENS for _ in a.sizes]
        table: dict[Expr, int] = dict(zip(a.sizes, sizes, strict=True))
        shapes = [[int_value(n, table) for n in t.shape] for t in a.tensors]
        extents = [int_value(x.extent, table) for x in a.axes]
        if min(extents) < 1 or any(n < 1 for shape in shapes for n in shape):
            raise Untried("its sizes cannot be made up")
        if prod(extents) > _MOST_WORK:
            raise Untried("it takes too much work for a trial")
        tensors = [_made(a, t.name, t.dtype, shape) for t, shape in zip(a.tensors, shapes, strict=True)]
        outputs = [x.fill_(float("nan")) for x in allocate(print_linear(a), tensors, sizes)]
        try:
            kernel(tensors, sizes, outputs)
        except CppKernelError as error:
            raise Untried(str(error)) from error
        return _differs(a, tensors, sizes, outputs)


def _made(a: Linear, name: str, dtype: str, shape: Sequence[int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(name))
    if dtype in ("i64", "i32", "i16", "i8", "u8", "bool"):
        return torch.full(tuple(shape), dtype == "bool").to(DTYPE_OF[dtype])
    x = torch.randn(tuple(shape), generator=generator)
    if name in {y.tensor for y in loads(a.decay)}:  # decays below one, whatever exponential they are
        x = -x.abs() * 0.3
    return (x * 0.4).to(DTYPE_OF[dtype])


def _differs(
    a: Linear, tensors: Sequence[torch.Tensor], sizes: Sequence[int], outputs: Sequence[torch.Tensor]
) -> str | None:
    """How the outputs of a call differ from the recurrence; empty where nothing can be compared."""
    with apart():
        table: dict[Expr, int] = dict(zip(a.sizes, sizes, strict=True))
        tokens = int_value(a.j.extent, table)
        if tokens < 1:
            return ""
        short = tokens > _TOKENS
        own = a if not short else _first(a)
        named = {t.name: x for t, x in zip(a.tensors, tensors, strict=True)}
        exact = interpret_linear(own, named, sizes, compute=torch.float64)
        plain = interpret_linear(own, named, sizes, compute=DTYPE_OF[a.compute_dtype])
        told = False
        for name, whole in zip(a.outputs, outputs, strict=True):
            if short and (name == "state" or a.sees == "all"):
                continue
            given = whole[..., : exact[name].shape[-2], :].double()
            want = exact[name]
            finite = want.isfinite() & plain[name].isfinite()
            if not finite.any():
                continue
            told = True
            if not bool(given[finite].isfinite().all()):
                return f"{name} is not finite where it should be"
            unit = max(torch.finfo(whole.dtype).eps, torch.finfo(DTYPE_OF[a.compute_dtype]).eps)
            error = (given - want)[finite].abs()
            allowed = 4 * float((plain[name].double() - want)[finite].abs().max())
            allowed += 8 * unit * float(want[finite].abs().max())
            if float(error.max()) > allowed:
                at = int(error.argmax())
                return f"{name} is {float(given[finite][at]):.6g} where it should be {float(want[finite][at]):.6g}"
        return None if told else ""


def _first(a: Linear) -> Linear:
    """`a` over its first tokens."""
    count = Const(_TOKENS)
    return replace(a, i=Axis(a.i.name, count), j=Axis(a.j.name, count))

