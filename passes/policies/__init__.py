"""Policies of a plan: approximate forms of an attention, each a frozen dataclass with its rule and its source.

A policy hides keys from the attention, by where they are (closed form) or by what a selection of the call says. It
takes any attention that is exact without it: the model's own mask stays, and is applied before anything is chosen.
"""

from attncc.passes.policies.chunks import Chunks
from attncc.passes.policies.sliding_tiles import SlidingTiles
from attncc.passes.policies.spans import Spans
from attncc.passes.policies.streaming import Streaming
from attncc.passes.policies.strides import Strides

__all__ = ["Chunks", "SlidingTiles", "Spans", "Streaming", "Strides"]
