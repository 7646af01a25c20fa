"""Attentions of linear work, and recurrences."""

from attncc.patterns.linear.chunks import chunked
from attncc.patterns.linear.linear import Recognised, linear_attentions
from attncc.patterns.linear.recurrence import recurrences

__all__ = [
    "Recognised", "chunked", "linear_attentions", "recurrences",
]  # fmt: skip
