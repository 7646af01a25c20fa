"""Products of many parameters, few of which run on every change."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest


def thinned(*axes: Sequence[Any]) -> list[Any]:
    """Every combination, marked `full` but for a diagonal, on which each value stands at least once.

    It wraps round where an axis is shorter than the longest, and is shifted there: axes of equal lengths would meet in
    the same pairs otherwise."""
    longest = max(map(len, axes), default=0)
    diagonal = {
        tuple((n + place * (n // len(axis))) % len(axis) for place, axis in enumerate(axes)) for n in range(longest)
    }
    marked: list[Any] = []
    for at in product(*(range(len(axis)) for axis in axes)):
        values = [axis[n] for axis, n in zip(axes, at, strict=True)]
        marked.append(pytest.param(*values, marks=() if at in diagonal else (pytest.mark.full,)))
    return marked
