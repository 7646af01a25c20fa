"""The zoo: real model classes and hand-written forms, all tiny, all random."""

from __future__ import annotations

from zoo.blocks import BLOCKED
from zoo.case import Case
from zoo.diffusion import DIFFUSION
from zoo.flex import FLEX
from zoo.forms import FORMS
from zoo.guards import GUARDS
from zoo.images import IMAGES
from zoo.joint import JOINT
from zoo.library import LIBRARY
from zoo.memory import MEMORY
from zoo.others import OTHERS
from zoo.reported import REPORTED
from zoo.sizes import SIZES
from zoo.sliding import SLIDING
from zoo.spellings import SPELLINGS
from zoo.text import TEXT
from zoo.vision import VISION
from zoo.wild import WILD

CASES: tuple[Case, ...] = (
    *SPELLINGS, *GUARDS, *WILD, *FORMS, *JOINT, *IMAGES, *FLEX, *LIBRARY, *MEMORY, *OTHERS, *SLIDING, *BLOCKED, *TEXT,
    *VISION, *DIFFUSION, *SIZES, *REPORTED,
)

assert len({case.name for case in CASES}) == len(CASES)

#: What is compiled on every change; the others run with `--full`. Forms that differ in how they are read alone need not
#: be here: `tests/unit/patterns/test_forms_of_the_zoo.py` reads all of them without compiling.
QUICK = frozenset({
    "q-scaled-first", "in-float32", "by-bmm",
    "safe-softmax", "masked-again", "times-the-mask", "decomposed-sdpa", "all-hidden", "lowest-maximum",
    "fill-minus-100", "clamped",
    "added-in-place", "triangle-in-the-graph", "window-in-the-graph", "documents", "by-vmap", "sdpa-causal",
    "sdpa-narrow-values",
    "sdpa-old-context", "element-by-element", "radial", "powers-of-two", "relu-shares", "graph-attention",
    "grouped-by-repeat", "values-times-transpose",
    "both-directions", "subtracted", "mixed-twice", "joint-heads", "two-products",
    "criss-cross", "autocast-off", "scaled-by-length",
    "sink-column", "sink-gate", "softcap", "alibi", "bucketed", "relative-shift", "decomposed",
    "channels", "class-token", "windows", "halo", "sorted-groups", "under-autocast", "with-weights",
    "flex", "flex-documents", "flex-merged", "flex-dynamic", "flex-by-tables",
    "memory-arithmetic", "memory-copy", "memory-channels", "memory-view-dynamic",
    "padded-cross", "dilated", "multihead-attention", "kernel-of-sdpa",
    "kernel-of-sdpa-sums",
    "transformer-encoder-post-norm", "decoding", "llama-static-cache", "linear-attention", "router",
    "sliding", "sliding-read-between",
    "sliding-unwritten",
    "sliding-scaled-chunks", "sliding-finite-ends", "sliding-finite-padding", "sliding-with-columns", "block-sparse",
    "number-of-keys",
    "branches", "sampling", "classifier", "pseudo-inverse", "changed-weights", "slots",
    "llama-eager", "llama-left-padded", "llama-dynamic", "gemma2", "gpt-oss-sinks", "deepseek-v3", "bloom",
    "bert-eager", "modernbert", "t5",
})  # fmt: skip

assert {case.name for case in CASES} >= QUICK
