"""Triton kernels from the IR: `emit` gives the source of a module, `configs` the ones worth trying."""

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
