"""What the files of this room read a graph with: its one door to the room below."""

from attncc.patterns.reader import (
    DOT,
    Contraction,
    Facts,
    Gradients,
    Place,
    Point,
    Reach,
    Reader,
    Unreadable,
    contraction,
    hint,
    is_operator,
    move,
    noticed,
    order_in_memory,
    written_args,
)

__all__ = [
    "DOT", "Contraction", "Facts", "Gradients", "Place", "Point", "Reach", "Reader", "Unreadable", "contraction",
    "hint", "is_operator", "move", "noticed", "order_in_memory", "written_args",
]  # fmt: skip
