"""Row 16, DELTA (arXiv 2510.09883): pages of the cache by the largest weight of any head."""

from attncc.bench.systems import dense
from attncc.bench.systems.system import System

SYSTEMS = (
    System(16, "DELTA", "plan", "policy", dense.decoding, 1, form="page-mass{page=16,budget=1024}",
           claim="1.5x end to end, 4-5x fewer attended tokens",
           gap="a layer that selects for itself; no other layer takes its pages over"),
)  # fmt: skip
