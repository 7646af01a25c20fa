"""What the Triton emitter does not take, and why."""

from __future__ import annotations

from attncc.codegen.triton.operands import head_sizes, operands
from attncc.ir import Attention, W
from attncc.ir.analysis import zero_at_zero
from attncc.ir.expr import free, loads

LARGEST_HEAD = 512


def unsupported(a: Attention) -> str | None:
    """Why `a` cannot be emitted for Triton, or None."""
    if a.compute_dtype == "f64":
        return "float64 operands: the Triton kernels compute in float32"
    sizes = head_sizes(a)
    if sizes is None:
        return "the head size is not a constant"
    if max(sizes) > LARGEST_HEAD:
        return f"the head size {max(sizes)} is over {LARGEST_HEAD}"
    if min(sizes) < 1:
        return "a head size of zero"
    if operands(a) is None:
        return "an operand's index is not affine in the axes"
    if a.normalizer == "softmax" and a.empty != "zero" and not zero_at_zero(a.weight, W):
        return "the weight of an unseen key is not zero"
    return None


def reads_by_key(a: Attention) -> bool:
    """Whether the mask reads data at keys, so that only lists made at the call say which blocks of keys are seen."""
    return any(a.j.index in free(x) for x in loads(a.mask))
