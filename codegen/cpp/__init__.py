"""C++ for CPUs: one freestanding translation unit an attention."""

from attncc.codegen.cpp.emitter import emit, instructions, unsupported
from attncc.codegen.cpp.gradient import emit_gradient, gradient_instructions, unsupported_gradient
from attncc.codegen.cpp.isa import ISAS

__all__ = [
    "ISAS", "emit", "emit_gradient", "gradient_instructions", "instructions", "unsupported", "unsupported_gradient",
]  # fmt: skip
