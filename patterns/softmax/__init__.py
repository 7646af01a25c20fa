"""Attentions that weigh each key for each query: one module a form, or a spelling of one."""

from attncc.patterns.softmax.anchors import SDPA, Anchor, Late, Term, calls_attention, normalisers
from attncc.patterns.softmax.flex import FLEX, lift_flex
from attncc.patterns.softmax.pieces import in_pieces
from attncc.patterns.softmax.sdpa import lift_sdpa
from attncc.patterns.softmax.softmax import lift_softmax
from attncc.patterns.softmax.unnormalised import lift_unnormalised, weighted_by_scores
from attncc.patterns.softmax.vector_weights import vector_quotients, weighs_components
from attncc.patterns.softmax.weight_users import Uses, Weights, uses

__all__ = [
    "FLEX", "SDPA", "Anchor", "Late", "Term", "Uses", "Weights", "calls_attention", "in_pieces", "lift_flex",
    "lift_sdpa", "lift_softmax", "lift_unnormalised", "normalisers", "uses", "vector_quotients", "weighs_components",
    "weighted_by_scores",
]  # fmt: skip
