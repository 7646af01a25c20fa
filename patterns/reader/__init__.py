"""Reading values: what a tensor is at an index, and what its operators are made of.

Here is what the rooms above read a graph with, the facts of its nodes among it."""

from attncc.patterns.graph import (
    CASTS,
    Facts,
    Gradients,
    Reduction,
    argument,
    has_argument,
    hint,
    is_maximum,
    is_operator,
    noticed,
    one_dim,
    op_name,
    order_in_memory,
    reduction,
    scaled_by,
    scattered,
    skip_casts,
    spelled_out,
    transform_of,
    written_args,
)
from attncc.patterns.reader.activations import log_sigmoid
from attncc.patterns.reader.assumptions import Context, Reach
from attncc.patterns.reader.bits import truth
from attncc.patterns.reader.contractions import DOT, Contraction, contraction, few, mixture, summed_pair, swapped
from attncc.patterns.reader.dropout import keeps, words_at
from attncc.patterns.reader.layers import Data, is_learned
from attncc.patterns.reader.pointwise import ELEMENTS, element_rule, input_at
from attncc.patterns.reader.rules import Point
from attncc.patterns.reader.size_arithmetic import number
from attncc.patterns.reader.sums_of_products import SUMS_AND_MEANS, factored, written_out
from attncc.patterns.reader.value import Reader, Unreadable
from attncc.patterns.reader.view_ops import VIEW_OPS, Move, broadcast, fitted, move, stops, unexpanded
from attncc.patterns.reader.writes import Place

__all__ = [
    "CASTS",
    "DOT",
    "ELEMENTS",
    "SUMS_AND_MEANS",
    "VIEW_OPS",
    "Context",
    "Contraction",
    "Data",
    "Facts",
    "Gradients",
    "Move",
    "Place",
    "Point",
    "Reach",
    "Reader",
    "Reduction",
    "Unreadable",
    "argument",
    "broadcast",
    "contraction",
    "element_rule",
    "factored",
    "few",
    "fitted",
    "has_argument",
    "hint",
    "input_at",
    "is_learned",
    "is_maximum",
    "is_operator",
    "keeps",
    "log_sigmoid",
    "mixture",
    "move",
    "noticed",
    "number",
    "one_dim",
    "op_name",
    "order_in_memory",
    "reduction",
    "scaled_by",
    "scattered",
    "skip_casts",
    "spelled_out",
    "stops",
    "summed_pair",
    "swapped",
    "transform_of",
    "truth",
    "unexpanded",
    "words_at",
    "written_args",
    "written_out",
]  # fmt: skip
