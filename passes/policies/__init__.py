"""Policies of a plan: approximate forms of an attention, each a frozen dataclass with its rule and its source.

A policy hides keys from the attention, by where they are (closed form) or by what a selection of the call says. It
takes any attention that is exact without it: the model's own mask stays, and is applied before anything is chosen.
"""

from attncc.passes.policies.antidiagonal import Antidiagonal
from attncc.passes.policies.blend import Blend
from attncc.passes.policies.block_means import BlockMeans
from attncc.passes.policies.certified_skip import CertifiedSkip
from attncc.passes.policies.chunk_means import ChunkMeans
from attncc.passes.policies.chunks import Chunks
from attncc.passes.policies.draft import Draft
from attncc.passes.policies.flex_prefill import FlexPrefill
from attncc.passes.policies.page_mass import PageMass
from attncc.passes.policies.pages import Pages
from attncc.passes.policies.pooled_rest import PooledRest
from attncc.passes.policies.rectified import Rectified
from attncc.passes.policies.routed import RoutedStreaming
from attncc.passes.policies.self_similar import SelfSimilar
from attncc.passes.policies.sliding_tiles import SlidingTiles
from attncc.passes.policies.spans import Spans
from attncc.passes.policies.streaming import Streaming
from attncc.passes.policies.strides import Strides
from attncc.passes.policies.vertical_slash import VerticalSlash

#: By where keys are, and by what a selection of each call says.
CLOSED_FORMS = Streaming, Spans, Strides, Chunks, SlidingTiles
SELECTED = (
    BlockMeans, Antidiagonal, SelfSimilar, ChunkMeans, Draft, VerticalSlash, FlexPrefill, Pages, PageMass,
    RoutedStreaming, PooledRest, Rectified,
)  # fmt: skip

#: By what the kernel finds on its way.
CERTIFIED = (CertifiedSkip,)

#: Effects: they change the output on purpose, and are no approximations of it.
EFFECTS = (Blend,)

__all__ = [
    "CERTIFIED", "CLOSED_FORMS", "EFFECTS", "SELECTED", "Antidiagonal", "Blend", "BlockMeans", "CertifiedSkip",
    "ChunkMeans", "Chunks", "Draft", "FlexPrefill", "PageMass", "Pages", "PooledRest", "Rectified", "RoutedStreaming",
    "SelfSimilar", "SlidingTiles", "Spans", "Streaming", "Strides", "VerticalSlash",
]  # fmt: skip
