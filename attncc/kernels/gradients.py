"""The backward of an attention from what its forward kept: a C++ or Triton kernel if there is one, else plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial

import torch

from attncc.codegen import cpp, torch_backward, triton
from attncc.codegen.torch_gradient import Gradients
from attncc.ir import Attention, Bounds, Tensor
from attncc.ir.attention_grad import AttentionGrad, shapes_of_grad
from attncc.ir.build import TRUE
from attncc.kernels.build import (
    Remembered,
    Target,
    default_store,
    kernel_name,
    optimise,
    target_of,
)
from attncc.kernels.compiled import NOT_MADE, checks, compiled, why_not_made
from attncc.kernels.first_gradient import differs, gradient_check, product_type
from attncc.kernels.skip_tables import BySize, Tabled
from attncc.passes.bounds.bounds import loop_bounds
from attncc.passes.gradient import gradient_of
from attncc.passes.tables.spans import Spanned, spanned, tables
from attncc.runtime.cpp import Ranks
from attncc.runtime.notices import notice
from attncc.runtime.op import Kernel
from attncc.runtime.outputs import signature_of
from attncc.runtime.triton_launch import TritonKernel


@dataclass(frozen=True)
class BuiltBackward:
    """A backward kernel with its source, or the reason why plain torch computes the gradients."""

    run: Gradients | None = None
    source: str = ""
    name: str = "plain torch"
    reason: str = ""


class WrongKernel(Exception):
    """A check at the first call found a backward kernel wrong."""


class Backward:
    """The gradients from what the forward kept, for `attncc.runtime.op`."""

    def kept(self, a: Attention, device: torch.device) -> tuple[str, ...] | None:
        names = torch_backward.kept(a)
        if names is not None and has_kernel(a, device):
            return tuple(dict.fromkeys(("out", *names)))
        return names

    def __call__(
        self, a: Attention, grads: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor],
        outputs: Mapping[str, torch.Tensor], sizes: Sequence[int], wanted: Sequence[bool],
    ) -> list[torch.Tensor] | None:  # fmt: skip
        if _suffices(a, tensors, outputs):
            names = tuple(t.name for t, w in zip(a.tensors, wanted, strict=True) if w)
            found = built_backward(a, names, tensors[0].device)
            if found.run is not None:
                made: dict[str, torch.Tensor] = dict(zip(a.outputs, grads, strict=True))
                with suppress(WrongKernel):
                    return found.run(made, tensors, outputs, sizes, names)
        return torch_backward.backward(a, grads, tensors, outputs, sizes, wanted, bounds=_bounds(a))


backward = Backward()


def _suffices(a: Attention, tensors: Sequence[torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> bool:
    """Whether a kernel can begin with what the forward kept: `delta` is of more keys than those here, and weights are
    made of scores and sums of rows where these are known well. Triton kernels see for themselves whether they are."""
    if not {"out", "lse"} <= set(outputs) or "delta" in outputs:
        return False
    lse = outputs["lse"]
    if not lse.is_cpu:
        return True
    if torch_backward.is_rough(lse, most=torch_backward.FAR if a.sink is None else torch_backward.ROUGH):
        return False
    return a.empty == "zero" or a.mask is TRUE or not bool((lse == float("-inf")).any())


@lru_cache(maxsize=1024)
def _bounds(a: Attention) -> Bounds:
    return loop_bounds(optimise(a), rows=True)


def has_kernel(a: Attention, device: torch.device) -> bool:
    """Whether the gradients of an attention's operands have a kernel on a device of this machine."""
    if device.type == "cuda" and not torch.cuda.is_available():  # tensors without data may claim to be anywhere
        return False
    operands = tuple(dict.fromkeys((a.q.tensor, a.k.tensor, a.v.tensor)))
    target = target_of(device)
    return not target.missing and not isinstance(_gradient(a, operands, target.device), str)


def built_backward(a: Attention, wanted: tuple[str, ...], device: torch.device) -> BuiltBackward:
    """The backward kernel for the gradients of the `wanted` tensors of an attention; compiled ones are in the store."""
    return _built(a, wanted, target_of(device))


def builds_of(wanted: Iterable[tuple[str, tuple[str, ...], str]]) -> list[Callable[[], object]]:
    """Jobs that build the backward kernels of (spec, tensors that learn, device), each once, for `build_all`."""
    return [
        partial(built_backward, signature_of(spec).attention, learned, torch.device(device))
        for spec, learned, device in dict.fromkeys(wanted)
        if learned
    ]


def described(a: Attention, wanted: tuple[str, ...], device: str) -> tuple[str, str | None]:
    """What computes the gradients of the `wanted` tensors, as a report says it, and the source where it is a kernel."""
    found = built_backward(a, wanted, torch.device(device))
    return (found.name, found.source) if found.run is not None else (f"{found.name}: {found.reason}", None)


@lru_cache(maxsize=1024)
def _gradient(a: Attention, wanted: tuple[str, ...], device: str) -> AttentionGrad | str:
    """The gradient that a kernel for a kind of device may be made of, or why none is."""
    if set(a.outputs) != {"out", "lse"}:
        return "the forward does not give its output and the sums of its rows"
    g = gradient_of(optimise(a), wanted)
    if isinstance(g, str):
        return g
    return (cpp if device == "cpu" else triton).unsupported_gradient(g) or g


@lru_cache(maxsize=1024)
def _built(a: Attention, wanted: tuple[str, ...], target: Target) -> BuiltBackward:
    with torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
        if target.missing:
            return BuiltBackward(reason=target.missing)
        g = _gradient(a, wanted, target.device)
        if isinstance(g, str):
            return BuiltBackward(reason=g)
        return _compiled(g, target) if target.device == "cpu" else _for_gpu(g, target)


def _for_gpu(g: AttentionGrad, target: Target) -> BuiltBackward:
    """Triton kernels; where the mask reads data by key, those for large calls make lists of what it shows first."""
    kernel, source = _triton(g, target, lists=False)
    if triton.reads_by_key(g.attention) or triton.reads_by_key(g.by_key):
        kernel = BySize(g.attention, kernel, lambda: _triton(g, target, lists=True)[0])
    return BuiltBackward(Gradients(g, kernel), source, f"Triton {target.arch} kernels")


def _triton(g: AttentionGrad, target: Target, *, lists: bool) -> tuple[Kernel, str]:
    rows, keys = loop_bounds(g.attention, rows=True), loop_bounds(g.by_key, rows=True)
    space = triton.gradient_configs(g, target.arch, tf32=target.tf32, lists=lists)
    sources = [triton.emit_gradient(g, rows, keys, *pair) for pair in space]
    # factors of products are rounded to their type; tf32 keeps as many digits as float16
    check = partial(differs, g, rounding=torch.float16 if target.tf32 else product_type(g)) if checks() else None
    remember = Remembered(default_store())
    kernel = TritonKernel(sources, remember=remember, check=check, report=notice, otherwise=lambda: _refused)
    return kernel, sources[0]


def _compiled(g: AttentionGrad, target: Target) -> BuiltBackward:
    """A C++ kernel; where the mask reads data by key, with others for large calls, whose loop bounds read tables: for
    each key the rows that may see it."""
    found = _cpp(g, target)
    if found.run is None:
        return found
    kernel = found.run.kernel
    for looking in ("none", "quick"):
        by_tables = spanned(g.by_key, by_looking=looking, fills=False)
        if by_tables.spans or by_tables.maps:
            kernel = Tabled(kernel, by_tables, partial(_tabled, g, by_tables, target, kernel))
        if not by_tables.more_by_looking:
            break
    return replace(found, run=Gradients(g, kernel))


def _cpp(
    g: AttentionGrad, target: Target, bounded: Spanned | None = None, *, wide: bool = False
) -> BuiltBackward:  # fmt: skip
    """The C++ kernel of `g`, or with the loop bounds of `bounded`; `wide` is for calls with sizes beyond 2^24."""
    a = g.attention
    assert target.toolchain is not None  # else the target would lack it
    more = () if bounded is None else bounded.attention.tensors[len(g.by_key.tensors) :]
    bounds = loop_bounds(g.by_key, rows=True) if bounded is None else bounded.bounds
    check = gradient_check(g, None if bounded is None else partial(tables, bounded))
    try:
        source = cpp.emit_gradient(g, bounds, target.arch, wide=wide, tables=more)
        name = f"backward-{kernel_name(a)}"
        larger = cache(lambda: _or_refused(_cpp(g, target, bounded, wide=True))) if a.sizes and not wide else None
        kernel = compiled(
            ranks_of(g, more), source, target.arch, target.toolchain, name, default_store(), check, lambda: _refused,
            larger,
        )  # fmt: skip
    except NOT_MADE as error:
        return BuiltBackward(reason=why_not_made(error))
    isa = cpp.gradient_instructions(g, target.arch)
    return BuiltBackward(Gradients(g, kernel), source, f"C++ {isa} kernel")


def _tabled(g: AttentionGrad, bounded: Spanned, target: Target, plain: Kernel) -> Kernel:
    """The kernel whose bounds read tables, or `plain`, which is given them too, where there is none."""
    found, own = _cpp(g, target, bounded).run, len(g.by_key.tensors)
    return found.kernel if found is not None else lambda tensors, sizes, outputs: plain(tensors[:own], sizes, outputs)


def _or_refused(found: BuiltBackward) -> Kernel:
    return _refused if found.run is None else found.run.kernel


def ranks_of(g: AttentionGrad, tables: tuple[Tensor, ...] = ()) -> Ranks:
    """What a backward kernel of `g` takes, whose loop bounds read `tables`."""
    a = g.by_key
    outputs = tuple(map(len, shapes_of_grad(g, [1] * len(a.sizes))))
    return Ranks(tuple(len(t.shape) for t in (*a.tensors, *tables)), len(a.sizes), outputs)


def _refused(tensors: Sequence[torch.Tensor], sizes: Sequence[int], outputs: Sequence[torch.Tensor]) -> None:
    """What stands in the place of a kernel that was found wrong."""
    raise WrongKernel
