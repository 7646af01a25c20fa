"""`attncc::attention`, the operator that compiled graphs hold: one opaque node an attention.

    attention(Tensor[] tensors, SymInt[] sizes, str spec) -> Tensor[]
    attention_gradients(Tensor[] grads, Tensor[] tensors, Tensor[] outputs, str kept, SymInt[] sizes, str spec,
                        bool[] wanted) -> Tensor[]

`spec` is the canonical text of the attention, so the node says by itself what it computes: a graph cached on disk runs
in a fresh process, and a cache sees every change. The kernel behind a spec is built at its first call on a device.
Gradients come from a second operator. Where the text gives the sums of the rows (`lse`), it begins with what the
forward kept; otherwise it recomputes through a differentiable form of the same text. Forward mode, and gradients of
gradients, go through the interpreter.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from threading import Lock
from typing import Any, Protocol, cast

import torch
from torch._functorch import autograd_function
from torch.autograd import function

from attncc.ir import Attention
from attncc.runtime.derivatives import (
    differentiated,
    gradients_of,
    gradients_of_gradients,
    outputs_of,
)
from attncc.runtime.outputs import Signature, signature_of
from attncc.runtime.recent import Recent
from attncc.runtime.watching import watcher
from attncc.torch_private.derivatives import each_of_a_batch, has_tangents
from attncc.torch_private.distributed import is_distributed


class Kernel(Protocol):
    """Writes the outputs of one attention. Called from any thread, tensors on the device it was built for."""

    def __call__(
        self, tensors: Sequence[torch.Tensor], sizes: Sequence[int], outputs: Sequence[torch.Tensor]
    ) -> None: ...


Build = Callable[[Attention, str, torch.device], Kernel]
Differentiable = Callable[[Attention, Sequence[torch.Tensor], Sequence[int]], list[torch.Tensor]]


class Backward(Protocol):
    """Gradients of an attention from what its forward kept."""

    def kept(self, a: Attention, device: torch.device) -> tuple[str, ...] | None:
        """The outputs of the forward that are needed, None where the gradients of `a` are not known this way."""
        ...

    def __call__(
        self, a: Attention, grads: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor],
        outputs: Mapping[str, torch.Tensor], sizes: Sequence[int], wanted: Sequence[bool],
    ) -> list[torch.Tensor] | None:  # fmt: skip
        """None where `outputs` are not enough: a cached graph keeps what was needed when it was made."""
        ...


class KernelError(RuntimeError):
    """A kernel could not be built or failed; the message holds the attention's text."""


#: Specs whose kernels are held ready; whoever builds them has those of older ones.
MOST_SITES = 1024
#: Where a kernel runs: the device, and of a GPU the precision of its float32 products, which callers switch.
_Place = torch.device | tuple[torch.device, str]


def _place(device: torch.device) -> _Place:
    return device if device.type == "cpu" else (device, str(_matmul.fp32_precision))


class _Site:
    """One spec: its plan, and its kernel at each place."""

    def __init__(self, spec: str) -> None:
        self.signature: Signature = signature_of(spec)
        self.kernels: dict[_Place, Kernel] = {}
        self.building = Lock()


class _Installed:
    """What the driver gave, and what was made of it. `install` replaces it whole: no reader sees half of it."""

    def __init__(
        self, build: Build, differentiable: Differentiable, backward: Backward | None = None
    ) -> None:  # fmt: skip
        self.build, self.differentiable, self.backward = build, differentiable, backward
        self.sites = Recent[str, _Site](MOST_SITES)

    def site(self, spec: str) -> _Site:
        return self.sites.get(spec) or self.sites.setdefault(spec, _Site(spec))

    def kernel(self, spec: str, device: torch.device) -> Kernel:
        site, place = self.site(spec), _place(device)
        with site.building:  # others wait for the one that builds; other specs do not
            if place not in site.kernels:
                site.kernels[place] = self._build(site.signature.attention, spec, device)
            return site.kernels[place]

    def kept(self, a: Attention, device: torch.device) -> tuple[str, ...]:
        """The outputs that backward reads, none where it begins with the tensors alone."""
        names = (None if self.backward is None else self.backward.kept(a, device)) or ()
        return names if set(names) <= set(a.outputs) else ()

    def _build(self, a: Attention, spec: str, device: torch.device) -> Kernel:
        try:
            return self.build(a, spec, device)
        except Exception as error:
            raise KernelError(f"no kernel for this attention on {device}: {error}\n{spec}") from error


def _nothing(*_: object) -> Any:
    raise KernelError("`import attncc` installs the kernels of attncc::attention")


_installed = _Installed(_nothing, _nothing)


def install(build: Build, differentiable: Differentiable, backward: Backward | None = None) -> None:
    """Say how kernels are made: `build(attention, spec, device)` once for each spec and device of this process, on a
    GPU for each precision of float32 products too, and `differentiable(attention, tensors, sizes)` for gradients, or
    `backward` for those that it knows. Kernels built before are forgotten."""
    global _installed
    _installed = _Installed(build, differentiable, backward)


def _forked() -> None:
    """Locks that another thread held when this process was forked are never given back."""
    install(_installed.build, _installed.differentiable, _installed.backward)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def kernel_of(spec: str, device: torch.device) -> Kernel:
    """The kernel of a spec on a device, built now if it is not there yet. Raises KernelError."""
    return _installed.kernel(spec, device)


def _run(tensors: list[torch.Tensor], sizes: list[int], spec: str) -> list[torch.Tensor]:
    installed = _installed
    site = installed.sites.get(spec) or installed.site(spec)
    outputs = site.signature.allocate(tensors, sizes)
    device = tensors[site.signature.anchor].device
    kernel = site.kernels.get(_place(device))
    if kernel is None:
        site.signature.check(tensors, sizes)  # the first call alone: graphs do not change what they pass
        kernel = installed.kernel(spec, device)
    seen = watcher.get()
    try:
        with nullcontext() if seen is None else seen(tensors, sizes, spec):
            kernel(tensors, sizes, outputs)
    except Exception as error:
        raise KernelError(f"the kernel of this attention failed on {device}: {error}\n{spec}") from error
    return outputs


def _run_backward(
    grads: list[torch.Tensor], tensors: list[torch.Tensor], outputs: list[torch.Tensor], kept: str, sizes: list[int],
    spec: str, wanted: list[bool],
) -> list[torch.Tensor]:  # fmt: skip
    """Gradients of the `wanted` ones of `tensors`; `outputs` are those that the forward kept for it, `kept` their
    names: a graph may have been cached by another version."""
    installed = _installed
    if installed.backward is not None:
        given = dict(zip(kept.split(","), outputs, strict=True)) if kept else {}
        with torch.inference_mode(False), torch.no_grad(), _autograd_on():
            known = installed.backward(signature_of(spec).attention, grads, tensors, given, sizes, wanted)
            if known is not None:
                return _as_promised(known, tensors, wanted)
    return _recomputed(grads, tensors, sizes, spec, wanted)


def _recomputed(
    grads: list[torch.Tensor], tensors: list[torch.Tensor], sizes: list[int], spec: str, wanted: list[bool]
) -> list[torch.Tensor]:
    """The same from the tensors alone."""
    with torch.inference_mode(False), torch.enable_grad(), _autograd_on():
        leaves = [t.detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
        outputs = _installed.differentiable(signature_of(spec).attention, leaves, sizes)
        found = differentiated(outputs, [leaf for leaf, w in zip(leaves, wanted, strict=True) if w], grads)
    return _as_promised(found, tensors, wanted)


def _as_promised(
    found: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor], wanted: Sequence[bool]
) -> list[torch.Tensor]:
    """Gradients with the dtypes and strides of `empty_like`, which the fake promised."""
    result: list[torch.Tensor] = []
    for x, g in zip([t for t, w in zip(tensors, wanted, strict=True) if w], found, strict=True):
        like = torch.empty_like(x)
        result.append(g if g.dtype == like.dtype and g.stride() == like.stride() else like.copy_(g))
    return result


def _autograd_on() -> AbstractContextManager[object]:
    """Autograd's dispatch keys let in again: an operator may run with them shut out."""
    exclude = _C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView"):
        exclude = exclude.remove(getattr(_C.DispatchKey, key))
    return _C._ForceDispatchKeyGuard(_C._dispatch_tls_local_include_set(), exclude)


def _fake(tensors: Sequence[torch.Tensor], sizes: Sequence[int], spec: str) -> list[torch.Tensor]:
    return signature_of(spec).allocate(tensors, sizes)


def _fake_backward(
    grads: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], kept: str,
    sizes: Sequence[int], spec: str, wanted: Sequence[bool],
) -> list[torch.Tensor]:  # fmt: skip
    return [torch.empty_like(t) for t, w in zip(tensors, wanted, strict=True) if w]


class _Differentiated(function._SingleLevelFunction):  # pyright: ignore[reportPrivateUsage]
    """The autograd node. Made below `torch.func`'s levels, which the dispatcher has dealt with by then: a plain
    `autograd.Function` would want to meet them itself."""

    @staticmethod
    def forward(ctx: Any, keys: Any, sizes: list[int], spec: str, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with _C._AutoDispatchBelowAutograd():
            outputs = tuple(_attention.redispatch(keys, tensors, sizes, spec))
        a = signature_of(spec).attention
        kept = _installed.kept(a, tensors[0].device)
        if kept and any(map(is_distributed, tensors)):  # parts over keys need what the weights' gradients sum to
            kept = tuple(dict.fromkeys((*kept, "out")))
        normal = (t.clone() if t.is_inference() else t for t in tensors)
        ctx.save_for_backward(*normal, *(outputs[a.outputs.index(name)] for name in kept))
        ctx.sizes, ctx.spec, ctx.count, ctx.kept = sizes, spec, len(tensors), ",".join(kept)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor | None, ...]:
        wanted = list(ctx.needs_input_grad[3:])
        saved = ctx.saved_tensors  # once: hooks that unpack them may compute them again
        tensors, kept = saved[: ctx.count], saved[ctx.count :]
        found = iter(_attention_gradients(grads, tensors, kept, ctx.kept, ctx.sizes, ctx.spec, wanted))
        return (None, None, None, *(next(found) if w else None for w in wanted))


class _GradientsDifferentiated(function._SingleLevelFunction):  # pyright: ignore[reportPrivateUsage]
    """The autograd node of the gradients. They are those of the kernel also where a graph of them is made, as
    `torch.func` always does; only who differentiates them again pays for it."""

    @staticmethod
    def forward(
        ctx: Any, keys: Any, count: int, outputs: list[torch.Tensor], kept: str, sizes: list[int], spec: str,
        wanted: list[bool], *given: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        ctx.save_for_backward(*given)
        ctx.count, ctx.sizes, ctx.spec, ctx.wanted = count, sizes, spec, wanted
        grads, tensors = list(given[:count]), list(given[count:])
        with _C._AutoDispatchBelowAutograd():
            return tuple(_attention_gradients.redispatch(keys, grads, tensors, outputs, kept, sizes, spec, wanted))

    @staticmethod
    def backward(ctx: Any, *seeds: Any) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors
        grads, tensors = saved[: ctx.count], saved[ctx.count :]
        sources, a = list(ctx.needs_input_grad[7:]), signature_of(ctx.spec).attention
        found = iter(gradients_of_gradients(a, grads, tensors, ctx.sizes, ctx.wanted, seeds, sources))
        return (None, None, None, None, None, None, None, *(next(found) if w else None for w in sources))


_single_level: Callable[[], AbstractContextManager[None]] = cast(
    Any, autograd_function
).enable_single_level_autograd_function
_differentiated = cast(Callable[..., tuple[torch.Tensor, ...]], cast(Any, _Differentiated).apply)
_gradients_differentiated = cast(Callable[..., tuple[torch.Tensor, ...]], cast(Any, _GradientsDifferentiated).apply)


def _with_autograd(keys: Any, tensors: list[torch.Tensor], sizes: list[int], spec: str) -> Sequence[torch.Tensor]:
    """The entry of every call outside inference mode; `keys` are the dispatch keys of the tensors and the thread."""
    if has_tangents(tensors):
        return outputs_of(signature_of(spec).attention, tensors, sizes)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        with _single_level() if _C._are_functorch_transforms_active() else nullcontext():
            return _differentiated(keys & _AFTER_AUTOGRAD, sizes, spec, *tensors)
    if _leads_to_run(keys.raw_repr()):
        return _run(tensors, sizes, spec)
    with _C._AutoDispatchBelowAutograd():
        return _attention.redispatch(keys & _AFTER_AUTOGRAD, tensors, sizes, spec)


def _backward_with_autograd(
    keys: Any, grads: list[torch.Tensor], tensors: list[torch.Tensor], outputs: list[torch.Tensor], kept: str,
    sizes: list[int], spec: str, wanted: list[bool],
) -> Sequence[torch.Tensor]:  # fmt: skip
    """The same for gradients."""
    if has_tangents((*grads, *tensors)):
        return gradients_of(signature_of(spec).attention, grads, tensors, sizes, wanted)
    below = keys & _AFTER_AUTOGRAD
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*grads, *tensors)):
        with _single_level() if _C._are_functorch_transforms_active() else nullcontext():
            return _gradients_differentiated(
                below, len(grads), outputs, kept, sizes, spec, wanted, *grads, *tensors
            )
    with _C._AutoDispatchBelowAutograd():
        return _attention_gradients.redispatch(below, grads, tensors, outputs, kept, sizes, spec, wanted)


@cache
def _leads_to_run(keys: int) -> bool:
    """Whether the dispatcher would call `_run` next, for these keys: then the way through it is saved (4 us)."""
    next_key = (_C.DispatchKeySet.from_raw_repr(keys) & _AFTER_AUTOGRAD).highestPriorityTypeId()
    return next_key in (_C.DispatchKey.CPU, _C.DispatchKey.CUDA)


def _mapped(
    info: Any, dims: tuple[list[int | None], Any, None], tensors: list[torch.Tensor], sizes: list[int], spec: str
) -> tuple[list[torch.Tensor], list[int]]:
    return _stacked(info.batch_size, [(dims[0], tensors)], lambda of: _attention(of[0], sizes, spec))


def _mapped_backward(
    info: Any, dims: tuple[Any, ...], grads: list[torch.Tensor], tensors: list[torch.Tensor],
    outputs: list[torch.Tensor], kept: str, sizes: list[int], spec: str, wanted: list[bool],
) -> tuple[list[torch.Tensor], list[int]]:  # fmt: skip
    lists = [(dims[0], grads), (dims[1], tensors), (dims[2], outputs)]
    return _stacked(info.batch_size, lists, lambda of: _attention_gradients(*of, kept, sizes, spec, wanted))


def _each(tensors: list[torch.Tensor], sizes: list[int], spec: str) -> list[torch.Tensor]:
    return each_of_a_batch(tensors, lambda given: _attention(given, sizes, spec))


def _each_backward(
    grads: list[torch.Tensor], tensors: list[torch.Tensor], outputs: list[torch.Tensor], kept: str, sizes: list[int],
    spec: str, wanted: list[bool],
) -> list[torch.Tensor]:  # fmt: skip
    n, m = len(grads), len(grads) + len(tensors)

    def call(given: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        return _attention_gradients(given[:n], given[n:m], given[m:], kept, sizes, spec, wanted)

    return each_of_a_batch([*grads, *tensors, *outputs], call)


def _stacked(
    count: int, lists: Sequence[tuple[list[int | None], list[torch.Tensor]]],
    call: Callable[[list[list[torch.Tensor]]], Sequence[torch.Tensor]],
) -> tuple[list[torch.Tensor], list[int]]:  # fmt: skip
    """`vmap`: one call an index."""
    results = [
        call([[t if d is None else t.select(d, at) for d, t in zip(*pair, strict=True)] for pair in lists])
        for at in range(count)
    ]
    stacked = [torch.stack(same) for same in zip(*results, strict=True)]
    return stacked, [0] * len(stacked)


_matmul = cast(Any, torch.backends.cuda.matmul)
_C = cast(Any, torch._C)  # pyright: ignore[reportPrivateUsage]
_AFTER_AUTOGRAD = _C._after_autograd_keyset

_torch_library = cast(Any, torch.library)  # whose functions have partial types
_library = _torch_library.Library("attncc", "DEF")
#: flexible_layout: the kernels take any strides, so nothing is copied before a call
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
_library.define("attention(Tensor[] tensors, SymInt[] sizes, str spec) -> Tensor[]", tags=_TAGS)
_library.define(
    "attention_gradients(Tensor[] grads, Tensor[] tensors, Tensor[] outputs, str kept, SymInt[] sizes, str spec,"
    " bool[] wanted) -> Tensor[]",
    tags=_TAGS,
)
#: What graphs call that Inductor cached on disk before outputs were kept.
_library.define(
    "attention_backward(Tensor[] grads, Tensor[] tensors, SymInt[] sizes, str spec, bool[] wanted) -> Tensor[]",
    tags=_TAGS,
)
_attention: Any = torch.ops.attncc.attention.default
_attention_gradients: Any = torch.ops.attncc.attention_gradients.default
_library.impl("attention", _run, "CompositeExplicitAutograd")
_library.impl("attention", _with_autograd, "Autograd", with_keyset=True)
_library.impl("attention_gradients", _run_backward, "CompositeExplicitAutograd")
_library.impl("attention_backward", _recomputed, "CompositeExplicitAutograd")
_library.impl("attention_gradients", _backward_with_autograd, "Autograd", with_keyset=True)
_library.impl("attention", _each, "Batched")
_library.impl("attention_gradients", _each_backward, "Batched")
_torch_library.register_fake(_attention, _fake, lib=_library)
_torch_library.register_fake(_attention_gradients, _fake_backward, lib=_library)
_torch_library.register_vmap(_attention, _mapped, lib=_library)
_torch_library.register_vmap(_attention_gradients, _mapped_backward, lib=_library)
