"""Row 15, DraftAttention (arXiv 2505.14708): patches of the pooled grid choose patches, ranked over a head's map."""

from attncc.bench.systems import dense
from attncc.bench.systems.system import System

SYSTEMS = (
    System(15, "DraftAttention", "plan", "policy", lambda full: dense.make(full, causal=False), 1,
           form="draft{grid=64x64,patch=8x16,sparsity=0.75}", claim="up to 1.75x end to end",
           gap="one frame of 64 x 64 tokens, one layer"),
)  # fmt: skip
