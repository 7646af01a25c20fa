"""Attentions of linear work, and recurrences."""

from attncc.patterns.linear.linear import Recognised, linear_attentions
from attncc.patterns.linear.recurrence import recurrences

__all__ = [
    "Recognised", "linear_attentions", "recurrences",
]  # fmt: skip
