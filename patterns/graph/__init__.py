"""Facts of a graph and of its nodes: shapes, memory, what an operator says of itself."""

from attncc.patterns.graph.facts import Facts, asked_once
from attncc.patterns.graph.gradients import Gradients
from attncc.patterns.graph.operators import (
    argument,
    dim_argument,
    formula,
    has_argument,
    hint,
    is_operator,
    op_name,
    scaled_by,
    spelled_out,
    takes_tensors,
    transform_of,
    written_args,
)
from attncc.patterns.graph.reductions import (
    CASTS,
    EXPS,
    MAXES,
    SUMS,
    alike,
    exponent,
    is_maximum,
    one_dim,
    reduction,
    scattered,
    skip_casts,
    tensor,
    written,
)
from attncc.patterns.graph.strides import noticed, order_in_memory

__all__ = [
    "CASTS", "EXPS", "MAXES", "SUMS", "Facts", "Gradients", "alike", "argument", "asked_once", "dim_argument",
    "exponent", "formula", "has_argument", "hint", "is_maximum", "is_operator", "noticed", "one_dim", "op_name",
    "order_in_memory", "reduction", "scaled_by", "scattered", "skip_casts", "spelled_out", "takes_tensors", "tensor",
    "transform_of", "written", "written_args",
]  # fmt: skip
