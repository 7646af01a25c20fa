"""Why something that looks like attention is none."""

from attncc.patterns.refusals.gating import gates
from attncc.patterns.refusals.hindrances import meets
from attncc.patterns.refusals.reasons import (
    compares,
    dropping,
    made_of,
    of_quotient,
    of_scores,
    of_use,
    under_transform,
)
from attncc.patterns.refusals.unknown import unknown_weights

__all__ = [
    "compares", "dropping", "gates", "made_of", "meets", "of_quotient", "of_scores", "of_use", "under_transform",
    "unknown_weights",
]  # fmt: skip
