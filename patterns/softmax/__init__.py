"""Attentions that weigh each key for each query: one module a form, or a spelling of one."""

from attncc.patterns.softmax.anchors import SDPA, Anchor, find_anchors, near_misses
from attncc.patterns.softmax.flex import FLEX, lift_flex
from attncc.patterns.softmax.late_division import divided
from attncc.patterns.softmax.pieces import in_pieces
from attncc.patterns.softmax.sdpa import lift_sdpa
from attncc.patterns.softmax.softmax import lift_softmax
from attncc.patterns.softmax.sums_of_softmaxes import Term
from attncc.patterns.softmax.unnormalised import lift_unnormalised, weighted_by_scores
from attncc.patterns.softmax.vector_weights import vector_quotients, weighs_components
from attncc.patterns.softmax.weight_users import Uses, Weights, uses

__all__ = [
    "FLEX", "SDPA", "Anchor", "Term", "Uses", "Weights", "divided", "find_anchors", "in_pieces",
    "lift_flex", "lift_sdpa", "lift_softmax", "lift_unnormalised", "near_misses", "uses", "vector_quotients",
    "weighs_components", "weighted_by_scores",
]  # fmt: skip
