"""Gradients: derivatives of expressions, and the gradient of an attention."""

from attncc.passes.gradient.attention import gradient_of
from attncc.passes.gradient.derivative import NotDifferentiable, derivative

__all__ = ["NotDifferentiable", "derivative", "gradient_of"]
