"""`attncc::linear`, the operator of linear attentions: one opaque node for each.

    linear(Tensor[] tensors, SymInt[] sizes, str spec) -> Tensor[]
    linear_gradients(Tensor[] grads, Tensor[] tensors, SymInt[] sizes, str spec, bool[] wanted) -> Tensor[]

`spec` is the canonical text of the node, as for `attncc::attention`. Gradients come from a kernel that goes over the
chunks once more, and back (`attncc.runtime.linear_factors`), or, where there is none, from the exact form by chunks,
which torch differentiates; so do gradients of gradients. Nothing but the tensors is kept for backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, cast

import torch

from attncc.ir import Linear, kind_of, parse_linear
from attncc.ir.evaluate import DTYPE_OF, int_value
from attncc.ir.expr import Expr
from attncc.ir.interpret_linear import interpret_linear
from attncc.ir.linear_chunks import by_chunks, unchunked
from attncc.runtime.derivatives import differentiated
from attncc.runtime.linear_factors import gradients
from attncc.runtime.op import Kernel, KernelError
from attncc.runtime.recent import Recent

Build = Callable[[str, torch.device], Kernel]
BuildGradient = Callable[[str, torch.device], Kernel | None]


def _nothing(*_: object) -> Any:
    raise KernelError("`import attncc` installs the kernels of attncc::linear")


_build: Build = _nothing
_build_gradient: BuildGradient = _nothing
_kernels = Recent[tuple[str, torch.device], Kernel](1024)
_gradient_kernels = Recent[tuple[str, torch.device], Kernel | None](1024)


def install(build: Build, gradient: BuildGradient) -> None:
    """Say how kernels are made: `build(spec, device)`, and `gradient(spec, device)`, which may know none; once for each
    in this process."""
    global _build, _kernels, _build_gradient, _gradient_kernels
    _build, _kernels = build, Recent[tuple[str, torch.device], Kernel](1024)
    _build_gradient, _gradient_kernels = gradient, Recent[tuple[str, torch.device], Kernel | None](1024)


@lru_cache(maxsize=1024)
def linear_of(spec: str) -> Linear:
    """The node of a canonical text. Raises ParseError on anything else."""
    return parse_linear(spec)


def allocate(spec: str, tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
    """Uninitialised outputs. Raises ValueError when the call has not the tensors and sizes that the spec declares."""
    a = linear_of(spec)
    if len(tensors) != len(a.tensors) or len(sizes) != len(a.sizes):
        raise ValueError(f"the linear attention declares {len(a.tensors)} tensors and {len(a.sizes)} sizes")
    device = tensors[0].device
    # Sizes of a trace are symbols, each a new key: only numbers are worth remembering.
    known = all(type(n) is int for n in sizes)
    shapes = (_shapes if known else _shapes.__wrapped__)(spec, tuple(sizes))
    return [torch.empty_strided(shape, strides, dtype=dtype, device=device) for shape, strides, dtype in shapes]


@lru_cache(maxsize=1024)
def _shapes(spec: str, sizes: tuple[int, ...]) -> list[tuple[list[int], list[int], torch.dtype]]:
    """Shape, strides and type of each output."""
    a = linear_of(spec)
    table: dict[Expr, int] = dict(zip(a.sizes, sizes, strict=True))
    found: list[tuple[list[int], list[int], torch.dtype]] = []
    for t in kind_of(a).gives(a):
        shape = [int_value(n, table) for n in t.shape]
        order = list(range(len(shape)))
        if t.name == "state" and _is_turned(a):
            order[-2:] = order[:-3:-1]
        strides, step = [1] * len(shape), 1
        for at in reversed(order):
            strides[at] = step
            step = step * shape[at]
        found.append((shape, strides, DTYPE_OF[t.dtype]))
    return found


def _is_turned(a: Linear) -> bool:
    """Whether states lie by (e, d) in memory: the next one then lies as the one that it follows."""
    return a.state is not None and a.state.index[-1] is a.d.index and a.e.index in a.state.index


def portable(
    a: Linear, tensors: Sequence[torch.Tensor], sizes: Sequence[int]
) -> list[torch.Tensor]:
    """The outputs in plain torch, which differentiates them: by chunks where that can be, else step by step."""
    named = {t.name: x for t, x in zip(a.tensors, tensors, strict=True)}
    run = by_chunks if unchunked(a) is None else interpret_linear
    found = run(a, named, sizes, compute=DTYPE_OF[a.compute_dtype])
    return [found[t.name].to(DTYPE_OF[t.dtype]) for t in kind_of(a).gives(a)]


def _run(tensors: list[torch.Tensor], sizes: list[int], spec: str) -> list[torch.Tensor]:
    outputs = allocate(spec, tensors, sizes)
    key = spec, tensors[0].device
    kernel = _kernels.get(key)
    if kernel is None:
        _check(spec, tensors, sizes)  # the first call alone: graphs do not change what they pass
        kernel = _kernels.setdefault(key, _build(spec, tensors[0].device))
    try:
        kernel(tensors, sizes, outputs)
    except Exception as error:
        raise KernelError(f"the kernel of this linear attention failed: {error}\n{spec}") from error
    return outputs


def _check(spec: str, tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> None:
    a = linear_of(spec)
    table: dict[Expr, int] = dict(zip(a.sizes, sizes, strict=True))
    for t, x in zip(a.tensors, tensors, strict=True):
        least = [int_value(n, table) for n in t.shape]
        fits = x.ndim == len(least) and all(n >= m for n, m in zip(x.shape, least, strict=True))
        if x.dtype != DTYPE_OF[t.dtype] or not fits:
            raise ValueError(f"the linear attention declares {t.name}: {t.dtype}{least}, got {x.dtype}{list(x.shape)}")


def _gradients(
    grads: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor], sizes: Sequence[int], spec: str,
    wanted: Sequence[bool], *, graph: bool = False,
) -> list[torch.Tensor]:  # fmt: skip
    with torch.enable_grad():
        leaves = [
            (t.view_as(t) if graph and t.requires_grad else t.detach().requires_grad_()) if w else t.detach()
            for t, w in zip(tensors, wanted, strict=True)
        ]
        outputs = portable(linear_of(spec), leaves, sizes)
        return differentiated(outputs, [x for x, w in zip(leaves, wanted, strict=True) if w], grads, create_graph=graph)


def _gradient_kernel(spec: str, device: torch.device) -> Kernel | None:
    key = spec, device
    if key in _gradient_kernels:
        return _gradient_kernels.get(key)
    return _gradient_kernels.setdefault(key, _build_gradient(spec, device))


def _run_gradients(
    grads: list[torch.Tensor], tensors: list[torch.Tensor], sizes: list[int], spec: str, wanted: list[bool]
) -> list[torch.Tensor]:
    with torch.inference_mode(False):
        grads = [g.clone() if g.is_inference() else g for g in grads]
        tensors = [t.clone() if t.is_inference() else t for t in tensors]
        kernel = _gradient_kernel(spec, tensors[0].device)
        if kernel is None:
            found = _gradients(grads, tensors, sizes, spec, wanted)
        else:
            found = gradients(linear_of(spec), kernel, grads, tensors, sizes, wanted)
    promised = [torch.empty_like(t) for t, w in zip(tensors, wanted, strict=True) if w]
    return [x if x.stride() == y.stride() else y.copy_(x) for x, y in zip(found, promised, strict=True)]


def _fake(tensors: Sequence[torch.Tensor], sizes: Sequence[int], spec: str) -> list[torch.Tensor]:
    return allocate(spec, tensors, sizes)


def _fake_gradients(
    grads: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor], sizes: Sequence[int], spec: str,
    wanted: Sequence[bool],
) -> list[torch.Tensor]:  # fmt: skip
    return [torch.empty_like(t) for t, w in zip(tensors, wanted, strict=True) if w]


def _kept(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    tensors, ctx.sizes, ctx.spec = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grads: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    tensors = list(ctx.saved_tensors)
    wanted = [bool(x) for x in ctx.needs_input_grad[0]]
    found = iter(torch.ops.attncc.linear_gradients(list(grads), tensors, ctx.sizes, ctx.spec, wanted))
    return [next(found) if w else None for w in wanted], _no_gradient(ctx.sizes), None


def _no_gradient(numbers: Sequence[object]) -> list[None] | None:
    """What torch wants returned for a list that holds no tensors: an empty one counts as a list of tensors."""
    return None if numbers else []


def _kept_again(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    grads, tensors, ctx.sizes, ctx.spec, ctx.wanted = inputs
    ctx.count = len(grads)
    ctx.save_for_backward(*grads, *tensors)


def _backward_again(ctx: Any, seeds: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    saved = [x.detach().requires_grad_(x.is_floating_point()) for x in ctx.saved_tensors]
    grads, tensors = saved[: ctx.count], saved[ctx.count :]
    with torch.enable_grad():
        first = _gradients(grads, tensors, ctx.sizes, ctx.spec, ctx.wanted, graph=True)
        pairs = [(x, s) for x, s in zip(first, seeds, strict=True) if x.requires_grad]
        sources = [x for x in saved if x.requires_grad]
        given = torch.autograd.grad([x for x, _ in pairs], sources, [s for _, s in pairs], allow_unused=True)
    found = iter(given)
    each = [next(found) if x.requires_grad else None for x in saved]
    return each[: ctx.count], each[ctx.count :], _no_gradient(ctx.sizes), None, _no_gradient(ctx.wanted)


_torch_library = cast(Any, torch.library)  # whose functions have partial types
_library = _torch_library.Library("attncc", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
_library.define("linear(Tensor[] tensors, SymInt[] sizes, str spec) -> Tensor[]", tags=_TAGS)
_library.define(
    "linear_gradients(Tensor[] grads, Tensor[] tensors, SymInt[] sizes, str spec, bool[] wanted) -> Tensor[]",
    tags=_TAGS,
)
_library.impl("linear", _run, "CompositeExplicitAutograd")
_library.impl("linear_gradients", _run_gradients, "CompositeExplicitAutograd")
_torch_library.register_fake("attncc::linear", _fake, lib=_library)
_torch_library.register_fake("attncc::linear_gradients", _fake_gradients, lib=_library)
_torch_library.register_autograd("attncc::linear", _backward, setup_context=_kept, lib=_library)
_torch_library.register_autograd(
    "attncc::linear_gradients", _backward_again, setup_context=_kept_again, lib=_library
)
