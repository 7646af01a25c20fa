"""The graph around a site as a drawing: nodes in layers from operands to users, and the lines between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attncc.report.site import GraphNode

#: Of a box and the space around it, in the units of the drawing; a character of its text is about 7 wide.
_WIDE, _HIGH, _APART, _BETWEEN = 148, 36, 14, 30
_MOST_CHARACTERS = 20


@dataclass(frozen=True)
class Box:
    x: float
    y: float
    width: float
    height: float
    name: str
    operation: str
    title: str
    role: str


@dataclass(frozen=True)
class Line:
    x1: float
    y1: float
    x2: float
    y2: float


@dataclass(frozen=True)
class Drawing:
    """Boxes and lines in a field of `width` x `height`; `text` says the same in words."""

    width: float
    height: float
    boxes: tuple[Box, ...]
    lines: tuple[Line, ...]
    text: str


def drawing(nodes: Sequence[GraphNode]) -> Drawing | None:
    """None where there is nothing to draw. A node stands below all of its inputs; inputs of the graph stand right above
    their first user."""
    if not nodes:
        return None
    layer: list[int] = []
    for n in nodes:
        layer.append(1 + max((layer[a] for a in n.inputs), default=-1))
    for at in reversed(range(len(nodes))):
        users = [layer[u] for u, n in enumerate(nodes) if at in n.inputs]
        if not nodes[at].inputs and users:
            layer[at] = min(users) - 1
    rows: dict[int, list[int]] = {}
    for at, y in enumerate(layer):
        rows.setdefault(y, []).append(at)
    widest = max(map(len, rows.values()))
    width = widest * (_WIDE + _APART) + _APART
    boxes: dict[int, Box] = {}
    for level, y in enumerate(sorted(rows)):
        left = (width - len(rows[y]) * (_WIDE + _APART) + _APART) / 2
        for column, at in enumerate(rows[y]):
            boxes[at] = _box(nodes[at], left + column * (_WIDE + _APART), _APART + level * (_HIGH + _BETWEEN))
    lines = [_line(boxes[a], boxes[at]) for at, n in enumerate(nodes) for a in n.inputs]
    height = 2 * _APART + len(rows) * (_HIGH + _BETWEEN) - _BETWEEN
    return Drawing(width, height, tuple(boxes[at] for at in range(len(nodes))), tuple(lines), _in_words(nodes))


def _box(n: GraphNode, x: float, y: float) -> Box:
    return Box(x, y, _WIDE, _HIGH, _short(n.name), _short(n.operation or "input"), f"{n.name}: {n.operation}", n.role)


def _line(above: Box, below: Box) -> Line:
    return Line(above.x + above.width / 2, above.y + above.height, below.x + below.width / 2, below.y)


def _short(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 1] + "…"


def _in_words(nodes: Sequence[GraphNode]) -> str:
    """`scores = matmul(query, key); ...`, for those who do not see the drawing."""
    return "; ".join(
        f"{n.name} = {n.operation}({', '.join(nodes[a].name for a in n.inputs)})" for n in nodes if n.operation
    )
