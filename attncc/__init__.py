"""attncc, an attention compiler for PyTorch: `torch.compile(model, backend="attncc")`.

Importing it registers the operator `attncc::attention`, so that a saved program that holds one loads, and nothing else.
The compiler itself is imported when it is asked for. The logger `attncc` reports what it does; see docs/logging.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from attncc import errors as errors  # whose import sets up the logger
from attncc.runtime import kept as _kept
from attncc.runtime import linear_op as _linear_op
from attncc.runtime import op as _op
from attncc.runtime import ring as _ring
from attncc.version import __version__

if TYPE_CHECKING:
    import torch

    from attncc.driver.backend import attncc_backend as backend
    from attncc.driver.explanation import explain, explain_plan, explain_program
    from attncc.driver.installing import install_in_inductor
    from attncc.driver.recording import record
    from attncc.ir import Attention
    from attncc.plans.plan import Plan
    from attncc.plans.profile import profile
    from attncc.plans.stages import Settings

__all__ = [
    "Plan", "Settings", "__version__", "backend", "explain", "explain_plan", "explain_program", "install_in_inductor",
    "profile", "record",
]  # fmt: skip

_LAZY = {
    "backend": ("attncc.dynamo", "attncc_backend"),
    "explain": ("attncc.driver.explanation", "explain"),
    "explain_plan": ("attncc.driver.explanation", "explain_plan"),
    "Plan": ("attncc.plans.plan", "Plan"),
    "profile": ("attncc.plans.profile", "profile"),
    "Settings": ("attncc.plans.stages", "Settings"),
    "install_in_inductor": ("attncc.driver.installing", "install_in_inductor"),
    "record": ("attncc.driver.recording", "record"),
    "explain_program": ("attncc.driver.explanation", "explain_program"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'attncc' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    return getattr(import_module(module), attribute)


def _build(a: Attention, spec: str, device: torch.device) -> _op.Kernel:
    return import_module("attncc.kernels.build").build(a, spec, device)


def _build_linear(spec: str, device: torch.device) -> _op.Kernel:
    return import_module("attncc.kernels.linear").build_linear(spec, device)


def _build_linear_gradient(spec: str, device: torch.device) -> _op.Kernel | None:
    return import_module("attncc.kernels.linear_gradient").build_linear_gradient(spec, device)


def _build_boxes(dtype: torch.dtype) -> _op.Kernel | None:
    return import_module("attncc.kernels.boxes").build_boxes(dtype)


def _differentiable(a: Attention, tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
    return import_module("attncc.kernels.build").blocked(a, tensors, sizes)


class _Backward:
    def kept(self, a: Attention, device: torch.device) -> tuple[str, ...] | None:
        return import_module("attncc.kernels.gradients").backward.kept(a, device)

    def __call__(
        self, a: Attention, grads: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor],
        outputs: Mapping[str, torch.Tensor], sizes: Sequence[int], wanted: Sequence[bool],
    ) -> list[torch.Tensor] | None:  # fmt: skip
        return import_module("attncc.kernels.gradients").backward(a, grads, tensors, outputs, sizes, wanted)


def _seen(
    a: Attention, tensors: Sequence[torch.Tensor], sizes: Sequence[int], chunks: int, runs: int
) -> Sequence[Sequence[int]]:
    return import_module("attncc.kernels.visibility").seen(a, tensors, sizes, chunks, runs)


_op.install(_build, _differentiable, _Backward())
_linear_op.install(_build_linear, _build_linear_gradient)
_kept.install(_build_boxes)
_ring.install(_seen)
