"""C++ for CPUs: one freestanding translation unit an attention."""

from attncc.codegen.cpp.boxes import emit_boxes, unsupported_boxes
from attncc.codegen.cpp.emitter import emit, instructions, unsupported
from attncc.codegen.cpp.gradient import emit_gradient, gradient_instructions, unsupported_gradient
from attncc.codegen.cpp.isa import ISAS
from attncc.codegen.cpp.linear import emit_linear, unsupported_linear
from attncc.codegen.cpp.linear_gradient import emit_linear_gradient, unsupported_linear_gradient

__all__ = [
    "ISAS", "emit", "emit_boxes", "emit_gradient", "emit_linear", "emit_linear_gradient", "gradient_instructions",
    "instructions", "unsupported", "unsupported_boxes", "unsupported_gradient", "unsupported_linear",
    "unsupported_linear_gradient",
]  # fmt: skip
