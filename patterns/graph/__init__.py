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
from attncc.patterns.graph.reductions import CASTS, Reduction, is_maximum, one_dim, reduction, scattered, skip_casts
from attncc.patterns.graph.strides import noticed, order_in_memory

__all__ = [
    "CASTS", "Facts", "Gradients", "Reduction", "argument", "asked_once", "dim_argument", "formula", "has_argument",
    "hint", "is_maximum", "is_operator", "noticed", "one_dim", "op_name", "order_in_memory", "reduction", "scaled_by",
    "scattered", "skip_casts", "spelled_out", "takes_tensors", "transform_of", "written_args",
]  # fmt: skip
