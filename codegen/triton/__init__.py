"""Triton kernels from the IR: `emit` gives the source of a module, `configs` the ones worth trying.

What emits them is imported when it is asked for: a model on CPUs needs none of it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attncc.codegen.triton.config import TritonConfig, configs
    from attncc.codegen.triton.emitter import emit
    from attncc.codegen.triton.gradient import emit_gradient, unsupported_gradient
    from attncc.codegen.triton.gradient_config import gradient_configs
    from attncc.codegen.triton.linear import LinearConfig, emit_linear, unsupported_linear
    from attncc.codegen.triton.support import reads_by_key, unsupported

__all__ = [
    "LinearConfig", "TritonConfig", "configs", "emit", "emit_gradient", "emit_linear", "gradient_configs",
    "reads_by_key", "unsupported", "unsupported_gradient", "unsupported_linear",
]  # fmt: skip

_WHERE = {
    "TritonConfig": "config", "configs": "config", "emit": "emitter", "emit_gradient": "gradient",
    "unsupported_gradient": "gradient", "gradient_configs": "gradient_config", "reads_by_key": "support",
    "unsupported": "support", "LinearConfig": "linear", "emit_linear": "linear", "unsupported_linear": "linear",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    return found
