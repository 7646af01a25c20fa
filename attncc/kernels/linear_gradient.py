"""From a linear attention to the kernel of its gradient, and the check of that at its first use on a machine.

One kernel serves all nodes with one rule, one kind of decays and one compute type; sizes are those of the call. It is
held against torch's gradient of the exact form by chunks in float64, on made-up tokens that fill no chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial

import torch

from attncc.codegen import cpp
from attncc.codegen.cpp.linear_gradient import GIVES, SIZES, TAKES
from attncc.ir import Linear
from attncc.ir.evaluate import DTYPE_OF
from attncc.ir.expr import free
from attncc.ir.linear_chunks import Factors, recurrence_by_chunks
from attncc.kernels.build import Built, Target, default_store, target_of
from attncc.kernels.compiled import NOT_MADE, compiled, why_not_made
from attncc.kernels.first_use import Check
from attncc.runtime.cpp import Ranks
from attncc.runtime.linear_factors import factor_gradients
from attncc.runtime.linear_op import linear_of
from attncc.runtime.op import Kernel
from attncc.torch_private import apart

#: Heads, tokens, channels of keys and of values of the trial.
_TRIAL = 2, 71, 24, 40


class TorchGradient:
    """The gradient by torch, of the form by chunks; for machines on which the kernel was wrong."""

    def __init__(self, *, delta: bool) -> None:
        self.delta = delta

    def __call__(
        self, tensors: Sequence[torch.Tensor], sizes: Sequence[int], outputs: Sequence[torch.Tensor]
    ) -> None:
        q, k, v, log, rate, state, out, last = tensors
        for to, found in zip(outputs, _by_torch(Factors(q, k, v, log, rate[..., None], state), out, last,
                                                delta=self.delta), strict=True):  # fmt: skip
            to.copy_(found.reshape(to.shape))


def build_linear_gradient(spec: str, device: torch.device) -> Kernel | None:
    """The kernel of the gradient of a linear attention on a device, for `attncc.runtime.linear_op`; None where plain
    torch differentiates it."""
    built = built_linear_gradient(spec, str(device))
    return None if built.language == "torch" else built.kernel


def built_linear_gradient(spec: str, device: str) -> Built:
    """The same with what there is to say of it; where there is no kernel, the reason."""
    return _built(spec, target_of(torch.device(device)))


@lru_cache(maxsize=1024)
def _built(spec: str, target: Target) -> Built:
    a = linear_of(spec)
    reason = target.missing or cpp.unsupported_linear_gradient(a)
    if target.device != "cpu" and not reason:
        reason = f"no kernels of linear attention for device {target.device}"
    delta, channels = a.rule == "delta", a.d.index in free(a.decay)
    own = TorchGradient(delta=delta)
    if reason:
        return Built(own, "", "torch", "plain torch", reason)
    assert target.toolchain is not None  # else the target would lack it
    with torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
        try:
            source = cpp.emit_linear_gradient(a, target.arch)
            takes = Ranks(tuple(n for _, n in TAKES), len(SIZES), tuple(n for _, n in GIVES))
            check = partial(_wrong, delta=delta, channels=channels, dtype=DTYPE_OF[a.compute_dtype])
            kernel = compiled(
                takes, source, target.arch, target.toolchain, _name(a), default_store(),
                Check(check, lambda *_: ""), lambda: own, None,
            )  # fmt: skip
        except NOT_MADE as error:
            return Built(own, "", "torch", "plain torch", why_not_made(error))
    isa = "avx512" if target.arch in ("amx", "avx512bf16") else target.arch  # products run in the compute type
    return Built(kernel, source, "cpp", f"C++ {isa} kernel", note=target.toolchain.note, isa=isa)


def _name(a: Linear) -> str:
    """A readable name: `linear-delta-gradient-f32`."""
    return f"linear-{a.rule}-gradient-{a.compute_dtype}"


def _wrong(kernel: Kernel, *, delta: bool, channels: bool, dtype: torch.dtype) -> str | None:
    """What is wrong with a kernel on made-up data, nothing if it is right."""
    with apart():
        x, out, last = _made(delta=delta, channels=channels)

        few = Factors(*(y.to(dtype) for y in x if y is not None))
        want = _by_torch(x, out, last, delta=delta)
        plain = _by_torch(few, out.to(dtype), last.to(dtype), delta=delta)
        got = factor_gradients(kernel, few, out.to(dtype), last.to(dtype))
        unit = torch.finfo(dtype).eps
        for name, a, b, c in zip(Factors._fields, got, plain, want, strict=True):
            if not bool(a.isfinite().all()):
                return f"the gradient of {name} is not finite"
            error, allowed = (a - c).abs(), 4 * float((b - c).abs().max()) + 32 * unit * float(c.abs().max())
            if float(error.max()) > allowed:
                at = int(error.argmax())
                return f"the gradient of {name} is {float(a.flatten()[at]):.6g} and not {float(c.flatten()[at]):.6g}"
    return None


def _made(*, delta: bool, channels: bool) -> tuple[Factors, torch.Tensor, torch.Tensor]:
    heads, n, d, e = _TRIAL
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(1, heads, *shape, generator=generator, dtype=torch.float64)

    log = -random(n, d if channels else 1).abs() * 0.2
    log[..., n // 2, :] = -torch.inf  # a document begins
    rate = random(n, 1).sigmoid()
    k = torch.nn.functional.normalize(random(n, d), dim=-1) if delta else random(n, d) * 0.3
    return Factors(random(n, d), k, random(n, e), log, rate, random(d, e)), random(n, e), random(d, e)


def _by_torch(
    x: Factors, out: torch.Tensor, last: torch.Tensor, *, delta: bool
) -> list[torch.Tensor]:
    with torch.enable_grad():
        leaves = [y.detach().requires_grad_() for y in x if y is not None]
        outputs = recurrence_by_chunks(Factors(*leaves), 16, delta=delta)
        q, k, v, log, rate, state = torch.autograd.grad(outputs, leaves, [out, last])
    assert x.log is not None
    return [q, k, v, log.masked_fill(x.log.isneginf(), 0.0), rate, state]  # nothing goes over a decay of zero
