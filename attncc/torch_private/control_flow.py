"""torch's operators for control flow as a trace calls them: without Dynamo, whose part their public doors want."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

Run = Callable[..., Any]


def _operator(name: str) -> Any:
    return getattr(importlib.import_module(f"torch._higher_order_ops.{name}"), f"{name}_op")


def cond(taken: Any, yes: Run, no: Run, given: Sequence[Any]) -> tuple[Any, ...]:
    """What one of two functions of `given` gives, as a boolean tensor says."""
    return tuple(_operator("cond")(taken, yes, no, tuple(given)))


def while_loop(goes_on: Run, turn: Run, carried: Sequence[Any], given: Sequence[Any]) -> tuple[Any, ...]:
    """`turn` of what is carried and `given`, again and again while `goes_on` of them says so."""
    return tuple(_operator("while_loop")(goes_on, turn, tuple(carried), tuple(given)))


def scan(turn: Run, carried: Sequence[Any], along: Sequence[Any], given: Sequence[Any]) -> tuple[Any, ...]:
    """`turn` of what is carried, one element of each of `along` (by its first dimension) and `given`: what is carried
    at the end, and the other results of all turns, stacked."""
    return tuple(_operator("scan")(turn, list(carried), list(along), tuple(given)))
