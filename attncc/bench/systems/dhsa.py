"""Row 10, DHSA (arXiv 2510.24606): chunks chosen by their means, or columns and diagonals by the last rows."""

from attncc.bench.systems import dense
from attncc.bench.systems.system import System

_CLAIM = "20-60% lower prefill latency, 35% less memory; 3.4x one layer at 128K, 6.25% density"
SYSTEMS = (
    System(10, "DHSA", "chunk means", "policy", lambda full: dense.make(full, causal=True), 1,
           form="chunk-means{chunk=128,budget=512}", claim=_CLAIM,
           gap="chunks of one length, where theirs come from a trained predictor"),
    System(10, "DHSA", "columns and diagonals", "policy", lambda full: dense.make(full, causal=True), 1,
           form="vertical-slash{columns=100,diagonals=512}", claim=_CLAIM),
)  # fmt: skip
