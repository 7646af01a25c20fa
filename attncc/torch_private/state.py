"""The state of torch that running a graph changes, put back as it was: private torch API, like `torch_private`.

A Dynamo graph opens regions and closes them again: levels of `torch.func`'s transforms, autocast, gradients on and off,
the kernels that SDPA may take. A run that fails in the middle of one leaves it open for all that runs afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

_C: Any = torch._C
_FUNCTORCH: Any = _C._functorch


@dataclass(frozen=True)
class Setting:
    """One thing that a graph can change: `put(read())` changes nothing."""

    name: str
    read: Callable[[], Any]
    put: Callable[[Any], object]


def _nesting() -> int:
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def _put_nesting(depth: int) -> None:
    while _nesting() > depth:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
    while _nesting() < depth:
        torch.autocast_increment_nesting()


def _dual_level_open() -> bool:
    """Whether a level of forward-mode differentiation is open: there is one at most, and no way to ask for it."""
    try:
        level = _C._enter_dual_level()
    except RuntimeError:
        return True
    _C._exit_dual_level(level=level)
    return False


def _put_dual_level(opened: bool) -> None:
    if opened:
        _C._enter_dual_level()
    else:
        _C._exit_dual_level(level=0)


def _put_function_modes(depth: int) -> None:
    while _C._len_torch_function_stack() > depth:
        _C._pop_torch_function_stack()


def _put_hooks(message: str | None) -> None:
    if message is None:
        _C._autograd._saved_tensors_hooks_enable()
    else:
        _C._autograd._saved_tensors_hooks_disable(message, False)


_GRADIENTS = Setting("gradients", torch.is_grad_enabled, _C._set_grad_enabled)


def _devices() -> list[str]:
    accelerator = torch.accelerator.current_accelerator()
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


def _autocast(device: str) -> list[Setting]:
    return [
        Setting(
            f"autocast on {device}", lambda: torch.is_autocast_enabled(device),
            lambda on: torch.set_autocast_enabled(device, on),
        ),
        Setting(
            f"autocast's dtype on {device}", lambda: torch.get_autocast_dtype(device),
            lambda dtype: torch.set_autocast_dtype(device, dtype),
        ),
    ]  # fmt: skip


def _kernels_of_sdpa() -> list[Setting]:
    backends = torch.backends.cuda
    return [
        Setting("flash attention", backends.flash_sdp_enabled, backends.enable_flash_sdp),
        Setting("memory-efficient attention", backends.mem_efficient_sdp_enabled, backends.enable_mem_efficient_sdp),
        Setting("attention by products", backends.math_sdp_enabled, backends.enable_math_sdp),
        Setting("attention of cuDNN", backends.cudnn_sdp_enabled, backends.enable_cudnn_sdp),
        Setting("the order of SDPA's kernels", _C._get_sdp_priority_order, _C._set_sdp_priority_order),
    ]


def settings() -> tuple[Setting, ...]:
    """Everything of torch that nodes of a Dynamo graph change, innermost first: levels before what they changed.
    Inference mode is not among it: it ends with the object that began it."""
    return (
        Setting("transforms", _FUNCTORCH.get_dynamic_layer_stack_depth,
                _FUNCTORCH.pop_dynamic_layer_stack_and_undo_to_depth),
        Setting("forward-mode level", _dual_level_open, _put_dual_level),
        Setting("torch function modes", _C._len_torch_function_stack, _put_function_modes),
        _GRADIENTS,
        Setting("forward-mode gradients", _C._is_fwd_grad_enabled, _C._set_fwd_grad_enabled),
        Setting("threads of the backward", _C._is_multithreading_enabled, _C._set_multithreading_enabled),
        Setting("replayed views", _C._is_view_replay_enabled, _C._set_view_replay_enabled),
        Setting("requires_grad_ under transforms", _FUNCTORCH.get_inplace_requires_grad_allowed,
                _FUNCTORCH.set_inplace_requires_grad_allowed),
        Setting("autograd functions of one level", _FUNCTORCH.get_single_level_autograd_function_allowed,
                _FUNCTORCH.set_single_level_autograd_function_allowed),
        Setting("hooks of saved tensors", _C._autograd._saved_tensors_hooks_get_disabled_error_message, _put_hooks),
        *(setting for device in _devices() for setting in _autocast(device)),
        Setting("autocast's cache", torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
        Setting("autocast's nesting", _nesting, _put_nesting),
        *_kernels_of_sdpa(),
        Setting("deterministic algorithms", _deterministic, _put_deterministic),
        Setting("default dtype", torch.get_default_dtype, torch.set_default_dtype),
    )  # fmt: skip


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _put_deterministic(found: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(found[0], warn_only=found[1])


Modes = Sequence[tuple[Setting, Any]]


def modes() -> Modes:
    """What decides dtypes and gradients here: autocast's settings and whether gradients are on."""
    found = (*(x for device in _devices() for x in _autocast(device)), _GRADIENTS)
    return [(setting, setting.read()) for setting in found]


@contextmanager
def under(given: Modes) -> Iterator[None]:
    """Inside, what `modes` returned elsewhere holds."""
    before = modes()
    try:
        for setting, value in given:
            setting.put(value)
        yield
    finally:
        for setting, value in before:
            setting.put(value)


def autocasts() -> bool:
    """Whether autocast is on, for any device."""
    return any(torch.is_autocast_enabled(device) for device in _devices())


@contextmanager
def without_autocast() -> Iterator[None]:
    """Inside, operations compute in the dtypes that they are given."""
    before = [(device, torch.is_autocast_enabled(device)) for device in _devices()]
    try:
        for device, _ in before:
            torch.set_autocast_enabled(device, False)
        yield
    finally:
        for device, on in before:
            torch.set_autocast_enabled(device, on)


@contextmanager
def preserved() -> Iterator[None]:
    """Inside, graphs may be run, in part or whole: what they change of torch is put back, and no hook of the caller's
    on saved tensors sees what they save. Random numbers drawn inside are drawn again outside."""
    before = [(setting, setting.read()) for setting in settings()]
    drawn = torch.get_rng_state()
    packing = _C._autograd._saved_tensors_hooks_set_tracing(True)
    try:
        with _C._PreserveDispatchKeyGuard():
            yield
    finally:
        _C._autograd._saved_tensors_hooks_set_tracing(packing)
        for setting, value in before:
            if setting.read() != value:
                setting.put(value)
        torch.set_rng_state(drawn)
